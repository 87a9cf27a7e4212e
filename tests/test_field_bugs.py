"""Bugs that PPO and kernel libraries shipped, and the tests that keep each of them out of here.

Collected from the peers' issues and sources; the libraries they were found in are named.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
KERNELS = "kernels/test_{}_kernel.py"
LOG_PROBS, VOCABULARY, HEADS = map(KERNELS.format, ("log_probs", "vocabulary", "heads"))
GAE, LOSS, WHITEN, KL = map(KERNELS.format, ("gae", "ppo_loss", "whiten", "kl"))

BUGS = {
    "offsets beyond 2^31 elements overflow int32 (TRL, torchrl)": [
        ("test_aot.py", "test_rows_are_addressed_in_64_bits"),
        (VOCABULARY, "test_rows_more_than_2_to_the_31_logits_apart"),
        ("gpu/test_gpu.py", "test_more_elements_than_an_int32_can_count"),
    ],
    "rows on grid axis y end at 65535 (Liger GRPO)": [
        ("test_aot.py", "test_rows_are_never_on_the_short_axes_of_the_grid"),
    ],
    "a first block of -inf makes the row NaN (TRL, Fast-LLM, SkyRL)": [
        (LOG_PROBS, "test_the_first_half_impossible"),
        (LOG_PROBS, "test_nothing_possible"),
    ],
    "any -inf logit makes the entropy NaN (TRL, verl)": [
        (LOG_PROBS, "test_the_only_possible_logit_is_certain"),
        (VOCABULARY, "test_infinities_and_nan"),
    ],
    "all logits far below 0 give log-probs above 0 or NaN (verl, SkyRL)": [
        (LOG_PROBS, "test_an_offset_changes_nothing"),
        (LOG_PROBS, "test_log_probs_are_never_positive_nor_entropies_negative"),
    ],
    "strided inputs are read as if they were dense (rl_games, PufferLib)": [
        (LOG_PROBS, "test_strides"),
        (GAE, "test_outputs_keep_the_layout_of_the_values"),
        (LOSS, "test_strided_rows"),
        (HEADS, "test_row_tensors_that_are_columns_of_something"),
    ],
    "the launch goes to the wrong device (rl_games)": [
        ("gpu/test_gpu.py", "test_runs_on_a_device_that_is_not_the_current_one"),
    ],
    "the bootstrap value counts twice (rl-triton)": [
        (GAE, "test_with_lambda_1_and_no_end_the_return_is_the_discounted_sum_of_rewards"),
        ("test_gae.py", "test_lambda_one_is_the_discounted_return_with_one_bootstrap"),
    ],
    "terminated, truncated and next-step flags mixed up (PufferLib)": [
        (GAE, "test_a_row_both_terminated_and_truncated_is_terminated"),
        ("test_gae.py", "test_agrees_with_flags_that_mark_the_start_of_an_episode"),
        ("test_autoreset.py", ""),
    ],
    "lengths and temperatures compiled in: a new kernel for each (TRL, Liger, rl_games)": [
        (
            "test_aot.py",
            "test_another_number_of_rows_or_columns_or_temperature_compiles_nothing_new",
        ),
        ("test_aot.py", "test_another_horizon_compiles_nothing_new"),
    ],
    "sums of bf16 rounded between blocks (TRL, Liger)": [
        (LOG_PROBS, "test_the_error_is_no_more_than_twice_pytorchs"),
        (WHITEN, "test_low_precision_is_computed_in_float32"),
    ],
    "outputs edited in place corrupt the backward (TRL)": [
        (KL, "test_the_result_can_be_edited_in_place"),
        ("test_ppo_loss.py", "test_the_loss_may_be_divided_in_place"),
    ],
    "whitening of one or no valid token crashes or is NaN (ROLL)": [
        (WHITEN, "test_fewer_than_two_entries_stay"),
        ("test_ppo_loss.py", "test_moments_of_one_advantage_leave_it"),
    ],
    "equal advantages whiten to noise": [
        (WHITEN, "test_equal_entries_become_exactly_zero"),
        (LOSS, "test_equal_advantages_whiten_to_zero"),
    ],
    "vocabularies that are no power of two, or large (RL-Kernel)": [
        (LOG_PROBS, "test_large_shapes"),
        (VOCABULARY, "test_any_number_of_logits"),
    ],
    "an index outside the vocabulary reads foreign memory": [
        (LOG_PROBS, "test_an_index_out_of_range_is_nan_and_marked"),
        (VOCABULARY, "test_an_action_out_of_range_is_marked_and_makes_its_row_nan"),
        (HEADS, "test_an_action_out_of_its_head_is_marked_and_makes_its_row_nan"),
    ],
    "host numbers are frozen into CUDA graphs (PufferLib)": [
        ("gpu/test_gpu.py", "test_a_graph_replays_with_new_inputs_and_numbers"),
        (LOG_PROBS, "test_a_temperature_on_the_device_is_the_number"),
    ],
    "a mean of means over micro-batches": [(LOSS, "test_micro_batches_add_up_to_the_batch")],
    "k3 by exp(d) - 1 - d loses all digits near 0 (Liger)": [
        (LOSS, "test_the_ratio_is_one_before_the_first_step"),
    ],
    "an overflowing ratio gives inf or NaN": [
        (LOSS, "test_a_huge_log_ratio_gives_finite_loss_and_no_gradient_beyond_the_limit"),
    ],
    "masked tokens enter through inf * 0 (TRL, verl)": [
        (LOSS, "test_a_masked_row_is_never_used_whatever_it_holds"),
        (KL, "test_masked_rows_are_not_read"),
    ],
    "early returns and large tiles spill registers (Fast-LLM)": [
        ("test_aot.py", "test_no_configuration_spills_on_sm_90"),
    ],
    "the fallback is taken in silence (TRL)": [
        ("test_dispatch.py", "test_forcing_a_missing_twin_names_the_reason"),
    ],
    "float atomics change the bits from run to run (CCE, verl)": [
        (LOSS, "test_the_same_call_gives_the_same_bits"),
        ("gpu/test_gpu.py", "test_results_are_the_same_in_every_run"),
    ],
    "a host synchronisation in a hot path (Liger, fla, AReaL)": [
        ("gpu/test_gpu.py", "test_a_call_does_not_wait_for_the_device"),
    ],
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_has_its_tests(bug):
    assert BUGS[bug]
    for file, name in BUGS[bug]:
        text = (TESTS / file).read_text(encoding="utf-8")
        assert f"def {name}" in text, f"{file} has no {name}"
