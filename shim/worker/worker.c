/*
 * pkcs11-ha-worker: one vendor library in a process of its own, for the stubs of one client.
 *
 *   pkcs11-ha-worker --parent PID MODULE [--limit NAME=NUMBER]... [--user NAME]
 *                                                                 started by a member: its socket is descriptor 3
 *   pkcs11-ha-worker --listen PATH MODULE [--init-args TEXT]      for others: a process per client, at a Unix socket
 *
 * A client's control socket brings lines, its channels: each has a thread, and one call at a time.  When
 * the control socket ends, or the client's process does, the worker is gone at once, whatever the library is doing; if it
 * is stopped then, within a minute.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "serve.h"

enum { CONTINUE_S = 60, HELLO_MS = 10000 };

static void *functions[HA_FUNCTIONS];
static char *listening_at;
static char **confinement; /* pairs of --limit or --user and what follows it, in this order, and NULL */

/* library.c guards its calls with it: here the signal is ignored. */
unsigned char ha_guard_enter(void)
{
    return 0;
}

void ha_guard_leave(unsigned char guarded)
{
    (void)guarded;
}

static _Noreturn void fail(const char *what, const char *why)
{
    fprintf(stderr, "pkcs11-ha-worker: %s: %s\n", what, why);
    exit(1);
}

/* ---- what this process may ---- */

static bool limit(const char *wanted)
{
    static const struct {
        const char *name;
        int resource;
    } limits[] = {
        {"memory_bytes=", RLIMIT_AS}, {"open_files=", RLIMIT_NOFILE}, {"cpu_s=", RLIMIT_CPU}, {"core=", RLIMIT_CORE}};
    for (size_t k = 0; k < sizeof limits / sizeof *limits; k++) {
        size_t size = strlen(limits[k].name);
        if (strncmp(wanted, limits[k].name, size) != 0) continue;
        rlim_t number = strtoull(wanted + size, NULL, 10);
        return setrlimit(limits[k].resource, &(struct rlimit){number, number}) == 0;
    }
    errno = EINVAL;
    return false;
}

/* For good: with that user's groups, and none of the rights of before. */
static bool become(const char *name)
{
    errno = ENOENT;
    const struct passwd *user = getpwnam(name);
    return user && initgroups(name, user->pw_gid) == 0 && setresgid(user->pw_gid, user->pw_gid, user->pw_gid) == 0 &&
           setresuid(user->pw_uid, user->pw_uid, user->pw_uid) == 0;
}

/* Before the library is loaded: NULL or why it is not to be. */
static const char *confine(void)
{
    static char error[512];
    for (char **option = confinement; option && *option; option += 2) {
        bool is_limit = strcmp(option[0], "--limit") == 0;
        if (is_limit ? limit(option[1]) : become(option[1])) continue;
        snprintf(error, sizeof error, "%s %s: %s", is_limit ? "limit" : "user", option[1], strerror(errno));
        return error;
    }
    return NULL;
}

/* ---- a client ---- */

/* Loads the library; NULL or why it cannot be used. */
static const char *load(char *path, unsigned *major, unsigned *minor)
{
    static char error[512];
    char why[256] = "no memory";
    unsigned count;
    ha_library *library = ha_library_open(path, 0, error, sizeof error);
    if (!library) return error; /* with the path */
    void *list = ha_library_list(library, &count, major, minor, why, sizeof why);
    for (unsigned row = 0; list && row < count; row++) functions[row] = ha_library_function(library, list, row);
    snprintf(error, sizeof error, "%s: %s", path, why);
    return list ? NULL : error;
}

/* What the client wants to know first. */
static bool greet(int control, const char *error, unsigned major, unsigned minor)
{
    struct ha_message hello = {0};
    CK_BYTE has[HA_FUNCTIONS];
    for (unsigned row = 0; row < HA_FUNCTIONS; row++) has[row] = functions[row] && serve_rows[row];
    ha_message_begin(&hello, HA_WIRE_HELLO, 0);
    ha_put_bytes(&hello, ha_wire_version, strlen(ha_wire_version));
    ha_put_bytes(&hello, error ? error : "", error ? strlen(error) : 0);
    ha_put(&hello, major);
    ha_put(&hello, minor);
    ha_put_bytes(&hello, has, sizeof has);
    bool sent = !hello.no_memory && ha_send((struct ha_peer){control, -1}, &hello, 0) == HA_WIRE_DONE;
    ha_message_free(&hello);
    return sent && !error;
}

static void *serve_channel(void *argument)
{
    struct ha_line line = *(struct ha_line *)argument;
    free(argument);
    serve_line(&line, functions);
    ha_line_close(&line);
    return NULL;
}

/* A thread for what is a line; its end tells the client if there is none. */
static void begin_channel(const int handed[HA_LINE_FDS])
{
    pthread_t thread;
    struct ha_line taken, *line;
    if (!ha_line_take(&taken, handed)) return;
    if ((line = malloc(sizeof *line))) *line = taken;
    if (line && pthread_create(&thread, NULL, serve_channel, line) == 0) {
        pthread_detach(thread);
    } else {
        ha_line_close(&taken);
        free(line);
    }
}

/* The descriptors that came with a byte of the control socket: those of one line; false: it has ended. */
static bool take_channel(int control)
{
    char byte;
    int handed[HA_LINE_FDS];
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(HA_LINE_FDS * sizeof(int))];
    } ancillary;
    struct iovec iov = {&byte, 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &ancillary};
    message.msg_controllen = sizeof ancillary.space;
    ssize_t n = recvmsg(control, &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return true;
    if (n <= 0) return false;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
        return message.msg_flags & MSG_CTRUNC; /* no descriptors left here; else it is no client of ours */
    size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(handed, CMSG_DATA(header), count * sizeof(int));
    if (count == HA_LINE_FDS) begin_channel(handed);
    for (size_t k = 0; count < HA_LINE_FDS && k < count; k++) close(handed[k]);
    return true;
}

/* Who is stopped cannot see its client end: a timer continues it, a signal that does nothing to who runs. */
static void do_not_stay_stopped(void)
{
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGCONT};
    const struct itimerspec times = {{CONTINUE_S, 0}, {CONTINUE_S, 0}};
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) == 0) timer_settime(timer, 0, &times, NULL);
}

/* The client has a hold of us now, by a descriptor and not by a number. */
static bool is_called(int control)
{
    char go = 0;
    struct pollfd called = {.fd = control, .events = POLLIN};
    while (poll(&called, 1, HELLO_MS) < 0 && errno == EINTR) {
    }
    return recv(control, &go, 1, MSG_DONTWAIT) == 1 && go == HA_WIRE_GO;
}

/* With what the library has started, where that is ours alone to end. */
static _Noreturn void end(void)
{
    if (getpgrp() == getpid()) kill(0, SIGKILL);
    _exit(0); /* not exit(): a library that hangs would hold us */
}

/* Until the client ends. `client` is its process, -1: not known. */
static _Noreturn void serve_client(int control, int client, char *module)
{
    unsigned major = 0, minor = 0;
    do_not_stay_stopped();
    if (!is_called(control)) _exit(0);
    const char *error = confine();
    if (!error) error = load(module, &major, &minor);
    if (!greet(control, error, major, minor)) _exit(1);
    struct pollfd ends[] = {{.fd = control, .events = POLLIN}, {.fd = client, .events = POLLIN}};
    for (;;) {
        if (poll(ends, 2, -1) < 0 && errno != EINTR) break;
        if (ends[1].revents) break;
        if (ends[0].revents && !take_channel(control)) break;
    }
    end();
}

/* ---- started by a member ---- */

/*
 * The end of the application is told by its end of the socket; should somebody else have a copy of that (a child of a
 * fork that ran no handlers), by its process.  PR_SET_PDEATHSIG would tell of the thread that started us.
 */
static _Noreturn void serve_parent(pid_t parent, char *module)
{
    syscall(SYS_close_range, HA_WIRE_FD + 1, ~0U, 0); /* what the application forgot to keep to itself */
    int client = (int)syscall(SYS_pidfd_open, parent, 0);
    if (client < 0 && errno == ESRCH) _exit(0);
    fcntl(HA_WIRE_FD, F_SETFD, FD_CLOEXEC);
    serve_client(HA_WIRE_FD, client, module);
}

/* ---- listening ---- */

static void end_listening(int number)
{
    (void)number;
    unlink(listening_at);
    _exit(0);
}

static bool is_trusted(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && (peer.uid == 0 || peer.uid == geteuid());
}

static int open_listener(char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat there;
    if (strlen(path) >= sizeof address.sun_path) fail(path, "too long for a socket");
    memcpy(address.sun_path, path, strlen(path));
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (lstat(path, &there) == 0 && !S_ISSOCK(there.st_mode)) fail(path, "is there and no socket");
    /* A socket that nobody listens at was left behind. */
    if (connect(probe, (struct sockaddr *)&address, sizeof address) == 0) fail(path, "another worker listens there");
    if (errno == ECONNREFUSED) unlink(path);
    close(probe);
    umask(0177);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, HA_WIRE_LISTEN_BACKLOG) != 0)
        fail(path, strerror(errno));
    umask(077);
    return fd;
}

static _Noreturn void serve_all(char *path, char *module)
{
    /* One without a directory is searched for by the loader, when there is a client. */
    if (strchr(module, '/') && access(module, R_OK) != 0) fail(module, strerror(errno));
    int listener = open_listener(path);
    pid_t server = getpid();
    listening_at = path;
    signal(SIGTERM, end_listening);
    signal(SIGINT, end_listening);
    signal(SIGCHLD, SIG_IGN); /* the clients' processes end by themselves */
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0 && errno != EINTR && errno != ECONNABORTED) usleep(10000); /* no descriptors: some will be free */
        if (fd < 0) continue;
        if (is_trusted(fd) && fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != server) _exit(0);
            signal(SIGTERM, SIG_DFL);
            signal(SIGINT, SIG_DFL);
            signal(SIGCHLD, SIG_DFL);
            close(listener);
            serve_client(fd, -1, module);
        }
        close(fd);
    }
}

static _Noreturn void usage(void)
{
    fprintf(stderr, "usage: pkcs11-ha-worker --listen PATH MODULE [--init-args TEXT]\n");
    exit(2);
}

int main(int argc, char **argv)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL); /* whoever started us had reasons to block some */
    signal(SIGPIPE, SIG_IGN);
    if (argc < 4 || argc % 2 != 0) usage();
    if (strcmp(argv[1], "--parent") == 0) {
        confinement = argv + 4;
        serve_parent((pid_t)atoi(argv[2]), argv[3]);
    }
    if (strcmp(argv[1], "--listen") != 0 || argc > 6 || (argc == 6 && strcmp(argv[4], "--init-args") != 0)) usage();
    if (argc == 6) serve_init_args = argv[5];
    serve_all(argv[2], argv[3]);
}
