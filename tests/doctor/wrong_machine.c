/* What may be wrong with a machine, for the ranks that ask for it by name in the environment. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/types.h>
#include <mpi.h>

/* A clock that is ahead by as many seconds. */
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(which, now);
    const char *ahead = getenv("CLOCK_AHEAD_S");
    if (ahead && which == CLOCK_REALTIME) now->tv_sec += atoi(ahead);
    return code;
}

/* A file system without locks, below a folder. */
int flock(int file, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    const char *folder = getenv("NO_LOCKS_BELOW");
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (folder && readlink(link, path, sizeof path - 1) > 0 && !strncmp(path, folder, strlen(folder))) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return real(file, operation);
}

/* No process left for this user, or one that dies in the attempt. */
pid_t fork(void) {
    static pid_t (*real)(void);
    if (!real) real = dlsym(RTLD_NEXT, "fork");
    if (getenv("DIES_IN_FORK")) raise(SIGKILL);
    if (getenv("NO_FORK")) { errno = EAGAIN; return -1; }
    return real();
}

/* A reduction that goes wrong for long messages of fp32. */
int MPI_Allreduce(const void *mine, void *sum, int count, MPI_Datatype type, MPI_Op op, MPI_Comm comm) {
    int code = PMPI_Allreduce(mine, sum, count, type, op, comm);
    if (getenv("WRONG_SUMS") && type == MPI_FLOAT && count >= 1 << 16) ((float *)sum)[count / 2] += 7;
    return code;
}
