/* An NVTX tool for the tests: NVTX 3 loads the library that NVTX_INJECTION64_PATH names and hands it the
 * tables of its callbacks. Every push and pop becomes a line of the file that NVTX_RECORD names:
 *
 *     push <thread> <domain> <kind of message: 1 text, 3 registered string> <message>
 *     pop <thread> <domain>
 *
 * Numbers and layouts are those of nvtx3/nvtxDetail/nvtxTypes.h, written out so that no header is needed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TABLE_OF_CALLBACKS = 1 };
enum { MODULE_CORE = 1, MODULE_CORE2 = 5 };
enum { CORE_PUSH_EX = 8, CORE_PUSH_A = 9, CORE_POP = 11 };
enum { CORE2_PUSH_EX = 4, CORE2_POP = 5, CORE2_REGISTER_STRING_A = 10, CORE2_CREATE_A = 12 };
enum { MESSAGE_TEXT = 1, MESSAGE_REGISTERED = 3 };

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const void *message;
} attributes;

typedef void (*callback)(void);
typedef struct {
    size_t size;
    int (*module_table)(int module, callback ***table, unsigned *length);
} callbacks;

static void record(const char *line)
{
    const char *path = getenv("NVTX_RECORD");
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    if (file < 0 || write(file, line, strlen(line)) < 0)
        abort();
    close(file);
}

static const char *name_of(const void *domain)
{
    return domain ? domain : "default";
}

static int pushed(const void *domain, int kind, const char *message)
{
    char line[512];
    snprintf(line, sizeof line, "push %ld %s %d %s\n", syscall(SYS_gettid), name_of(domain), kind, message);
    record(line);
    return 0;
}

static int domain_push_ex(const void *domain, const attributes *a)
{
    /* A registered string's handle is the pointer that register_string gave out. */
    int known = a->message_type == MESSAGE_TEXT || a->message_type == MESSAGE_REGISTERED;
    return pushed(domain, a->message_type, known ? a->message : "?");
}

static int domain_pop(const void *domain)
{
    char line[256];
    snprintf(line, sizeof line, "pop %ld %s\n", syscall(SYS_gettid), name_of(domain));
    record(line);
    return 0;
}

static int push_ex(const attributes *a) { return domain_push_ex(NULL, a); }
static int push_a(const char *message) { return pushed(NULL, MESSAGE_TEXT, message); }
static int pop(void) { return domain_pop(NULL); }
static void *create_domain(const char *name) { return strdup(name); }
static void *register_string(const void *domain, const char *text) { return strdup(text); }

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t))
{
    const callbacks *all = export_table(TABLE_OF_CALLBACKS);
    callback **core, **core2;
    unsigned length, length2;

    if (!all || !all->module_table(MODULE_CORE, &core, &length) || length <= CORE_POP
        || !all->module_table(MODULE_CORE2, &core2, &length2) || length2 <= CORE2_CREATE_A)
        return 0;
    *core[CORE_PUSH_EX] = (callback)push_ex;
    *core[CORE_PUSH_A] = (callback)push_a;
    *core[CORE_POP] = (callback)pop;
    *core2[CORE2_PUSH_EX] = (callback)domain_push_ex;
    *core2[CORE2_POP] = (callback)domain_pop;
    *core2[CORE2_REGISTER_STRING_A] = (callback)register_string;
    *core2[CORE2_CREATE_A] = (callback)create_domain;
    return 1;
}
