/* Counts the operations that change files under a folder, and disturbs some of them.

   Loaded with LD_PRELOAD. From the environment:
     FAULT_DIR    the folder; what happens elsewhere is neither counted nor disturbed
     FAULT_LOG    a file, outside of it, that gets a line for every operation
     FAULT_AT     the number of the operation, from 1, that is disturbed; none without it
     FAULT_LAST   the last that is; FAULT_AT alone without it
     FAULT_ERRNO  the error that a disturbed operation fails with; without it, the process is killed
     FAULT_TORN   a disturbed write does half of its work first
     FAULT_LACKS  the error with which reserving space, locks, syncs of folders and copies in the
                  kernel always fail, as on a file system without them
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long count;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static int inside(const char *path) {
    const char *folder = getenv("FAULT_DIR");
    size_t n = folder ? strlen(folder) : 0;
    return n && !strncmp(path, folder, n) && (path[n] == '/' || !path[n]);
}

/* The path of an open file, or of a name relative to an open folder. */
static void locate(int fd, const char *name, char *out) {
    char link[64];
    ssize_t n;
    if (name && (*name == '/' || fd == AT_FDCWD)) {
        snprintf(out, PATH_MAX, "%s", name);
        return;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n = readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
    if (n > 0 && name) snprintf(out + n, PATH_MAX - n, "/%s", name);
}

static void note(const char *operation, const char *path, const char *to) {
    char line[3 * PATH_MAX];
    const char *log = getenv("FAULT_LOG");
    int fd, n;
    if (!log) return;
    n = snprintf(line, sizeof line, "%s\t%s\t%s\n", operation, path, to ? to : "");
    fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) return;
    if (syscall(SYS_write, fd, line, n) < 0) abort();
    syscall(SYS_close, fd);
}

/* Whether this is on a file system that has no such operation; then errno is set. */
static int lacking(const char *operation, const char *path) {
    struct stat found;
    int error = (int)setting("FAULT_LACKS", 0);
    if (!error || !inside(path)) return 0;
    if (!strcmp(operation, "fsync") && (stat(path, &found) || !S_ISDIR(found.st_mode))) return 0;
    if (!strcmp(operation, "fdatasync") || !strncmp(operation, "ftruncate", 9)) return 0;
    errno = error;
    return 1;
}

/* 0: go on. 1: fail, errno is set. 2: do half of it, then come back to `end`. */
static int disturbed(const char *operation, const char *path, const char *to) {
    long number, at;
    if (!inside(path) && !(to && inside(to))) return 0;
    number = atomic_fetch_add(&count, 1) + 1;
    note(operation, path, to);
    at = setting("FAULT_AT", 0);
    if (!at || number < at || number > setting("FAULT_LAST", at)) return 0;
    if (setting("FAULT_TORN", 0) && strstr(operation, "write")) return 2;
    if (!getenv("FAULT_ERRNO")) raise(SIGKILL);
    errno = (int)setting("FAULT_ERRNO", EIO);
    return 1;
}

static int end(void) {
    if (!getenv("FAULT_ERRNO")) raise(SIGKILL);
    errno = (int)setting("FAULT_ERRNO", EIO);
    return -1;
}

#define REAL(type, name, ...)                                  \
    static type (*real)(__VA_ARGS__);                          \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *data, size_t n) {
    char path[PATH_MAX];
    int how;
    REAL(ssize_t, "write", int, const void *, size_t);
    locate(fd, NULL, path);
    how = disturbed("write", path, NULL);
    if (how == 2 && real(fd, data, n / 2) >= 0) return end();
    return how ? -1 : real(fd, data, n);
}

#define PWRITE(name, offset)                                                  \
    ssize_t name(int fd, const void *data, size_t n, offset at) {             \
        char path[PATH_MAX];                                                  \
        int how;                                                              \
        REAL(ssize_t, #name, int, const void *, size_t, offset);              \
        locate(fd, NULL, path);                                               \
        how = disturbed("pwrite", path, NULL);                                \
        if (how == 2 && real(fd, data, n / 2, at) >= 0) return end();         \
        return how ? -1 : real(fd, data, n, at);                              \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_OPEN_FILE(type, name, failed, parameters, arguments) \
    type name parameters {                                      \
        char path[PATH_MAX];                                    \
        REAL(type, #name, PARAMETERS parameters);               \
        locate(fd, NULL, path);                                 \
        if (lacking(#name, path)) return failed;                \
        return disturbed(#name, path, NULL) ? failed : real arguments; \
    }
#define PARAMETERS(...) __VA_ARGS__
ON_OPEN_FILE(int, fsync, -1, (int fd), (fd))
ON_OPEN_FILE(int, fdatasync, -1, (int fd), (fd))
ON_OPEN_FILE(int, ftruncate, -1, (int fd, off_t n), (fd, n))
ON_OPEN_FILE(int, ftruncate64, -1, (int fd, off64_t n), (fd, n))
ON_OPEN_FILE(int, posix_fallocate, errno, (int fd, off_t a, off_t n), (fd, a, n))
ON_OPEN_FILE(int, posix_fallocate64, errno, (int fd, off64_t a, off64_t n), (fd, a, n))

ssize_t copy_file_range(int in, off64_t *from, int fd, off64_t *to, size_t n, unsigned flags) {
    char path[PATH_MAX];
    int how;
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    locate(fd, NULL, path);
    if (lacking("copy_file_range", path)) return -1;
    how = disturbed("copy_file_range, a write", path, NULL);
    if (how == 2 && real(in, from, fd, to, n / 2, flags) >= 0) return end();
    return how ? -1 : real(in, from, fd, to, n, flags);
}

int flock(int fd, int how) {
    char path[PATH_MAX];
    REAL(int, "flock", int, int);
    locate(fd, NULL, path);
    return lacking("flock", path) ? -1 : real(fd, how);
}

static int makes(int flags, const char *path) {
    if (!(flags & (O_CREAT | O_TRUNC))) return 0;
    return disturbed(access(path, F_OK) ? "create" : "truncate", path, NULL);
}

#define OPEN(name)                                          \
    int name(const char *path, int flags, ...) {            \
        va_list rest;                                       \
        mode_t mode;                                        \
        REAL(int, #name, const char *, int, ...);           \
        va_start(rest, flags);                              \
        mode = va_arg(rest, mode_t);                        \
        va_end(rest);                                       \
        return makes(flags, path) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define ON_NAME(name, parameters, arguments)                        \
    int name parameters {                                           \
        REAL(int, #name, PARAMETERS parameters);                    \
        return disturbed(#name, path, NULL) ? -1 : real arguments;  \
    }
ON_NAME(mkdir, (const char *path, mode_t mode), (path, mode))
ON_NAME(rmdir, (const char *path), (path))
ON_NAME(unlink, (const char *path), (path))
ON_NAME(truncate, (const char *path, off_t n), (path, n))
ON_NAME(truncate64, (const char *path, off64_t n), (path, n))

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    REAL(int, "unlinkat", int, const char *, int);
    locate(folder, name, path);
    return disturbed("unlinkat", path, NULL) ? -1 : real(folder, name, flags);
}

int rename(const char *path, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return disturbed("rename", path, to) ? -1 : real(path, to);
}

int link(const char *path, const char *to) {
    REAL(int, "link", const char *, const char *);
    return disturbed("link", path, to) ? -1 : real(path, to);
}

int linkat(int a, const char *path, int b, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    return disturbed("link", path, to) ? -1 : real(a, path, b, to, flags);
}
