/* Fails or kills at the n-th operation that changes a file below a folder: preloaded, and armed by amc_fault().
 *
 * Every open for writing, write, sync, rename, truncation, unlinking and making of a folder counts, whoever asks for
 * it: Python, SQLite or a library. So a fault can be put at each place where a program writes, in turn.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static char site[PATH_MAX + 32];
static long at, seen;
static int error, lasting;

/* error: an errno, or 0 to kill; lasting: every later operation fails as well; at < 0 only counts. */
void amc_fault(const char *below, long where, int what, int for_good) {
    snprintf(folder, sizeof folder, "%s", below);
    at = where, error = what, lasting = for_good, seen = 0, site[0] = 0;
}
long amc_seen(void) { return seen; }
const char *amc_site(void) { return site; }

static int strikes(const char *what, const char *path) {
    size_t length = strlen(folder);
    if (!length || !path || strncmp(path, folder, length)) return 0;
    long now = seen++;
    if (now == at || at < 0) snprintf(site, sizeof site, "%s %s", what, path + length);
    if (at < 0 || now < at || (now > at && !lasting)) return 0;
    if (!error) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

static int strikes_at(const char *what, int handle) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strikes(what, path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        REAL(name);                                                             \
        va_list list;                                                           \
        va_start(list, flags);                                                  \
        int mode = va_arg(list, int);                                           \
        va_end(list);                                                           \
        if ((flags & O_ACCMODE) != O_RDONLY && strikes("open", path)) return -1; \
        return real(path, flags, mode);                                         \
    }
OPEN(open)
OPEN(open64)

#define ON_HANDLE(type, name, what, arguments, names) \
    type name arguments {                             \
        REAL(name);                                   \
        if (strikes_at(what, handle)) return -1;      \
        return real names;                            \
    }
ON_HANDLE(ssize_t, write, "write", (int handle, const void *data, size_t count), (handle, data, count))
ON_HANDLE(ssize_t, pwrite, "write", (int handle, const void *data, size_t count, off_t to), (handle, data, count, to))
ON_HANDLE(ssize_t, pwrite64, "write", (int handle, const void *data, size_t count, off64_t to), (handle, data, count, to))
ON_HANDLE(ssize_t, writev, "write", (int handle, const struct iovec *parts, int count), (handle, parts, count))
ON_HANDLE(int, fsync, "sync", (int handle), (handle))
ON_HANDLE(int, fdatasync, "sync", (int handle), (handle))
ON_HANDLE(int, ftruncate, "truncate", (int handle, off_t length), (handle, length))
ON_HANDLE(int, ftruncate64, "truncate", (int handle, off64_t length), (handle, length))

int rename(const char *from, const char *to) {
    REAL(rename);
    return strikes("rename", to) ? -1 : real(from, to);
}
int unlink(const char *path) {
    REAL(unlink);
    return strikes("unlink", path) ? -1 : real(path);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return strikes("mkdir", path) ? -1 : real(path, mode);
}
