"""`python -m ppo_fast` is the `ppo-fast` command."""

from ppo_fast.cli import main

if __name__ == "__main__":
    main()
