/*
 * Remote members: the stubs' end of the channels to workers, which have the vendor libraries.
 *
 * A remote has one control socket, whose closing ends the worker, and a pool of channels: one call in flight each,
 * with a line to a thread of the worker.  Whatever goes wrong on a channel (its end, a late answer, an answer that
 * is not well formed) kills the whole remote: every call on it answers CKR_DEVICE_ERROR until it is started or
 * connected anew.  What the worker says is measured before it is used.
 *
 * Or there is no worker, and the threads are ours (hand.c).  Then what goes wrong ends its own channel alone, unless the
 * library takes one call at a time: with one left behind in it, those that wait for their turn are told at once.  The
 * call answers CKR_DEVICE_REMOVED: no later one would show that a member is lost whose library is well but for this.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "build.gen.h" /* HA_WORKER */
#include "serve.h"

enum { STACK = 1 << 16, IDLE_CHANNELS = 64, HANDS = 32, HELLO_LIMIT = 1 << 14, FAREWELL_MS = 2000 };

#ifndef PIDFD_SIGNAL_PROCESS_GROUP
#define PIDFD_SIGNAL_PROCESS_GROUP (1U << 2)
#endif

#define INSIDE_A_WORKER "PKCS11_HA_INSIDE_A_WORKER" /* a worker starts no workers: it may be loading us */

struct ha_channel {
    struct ha_line line;
    struct ha_hand *hand; /* its other end, if that is in this process */
    uint32_t turn;
    uint32_t life; /* of its remote */
    bool in_use;
    struct ha_message message;
    struct ha_channel *next; /* of its remote, idle or not */
};

struct remote {
    pthread_mutex_t lock;
    bool used, alive;
    uint32_t life; /* each start is another one */
    int control, pidfd;
    unsigned idle, most;              /* channels without a call; how many there may be at all, 0: any number */
    unsigned limits_ms[HA_DEADLINES]; /* of a call of each class, 0: none */
    struct ha_channel *channels;
    struct ha_hands *hands; /* threads at the other ends; NULL: it is a worker's */
    void *functions[HA_FUNCTIONS];
    pthread_cond_t given; /* a channel, where there may be no more */
    unsigned major, minor;
    CK_BYTE has[HA_FUNCTIONS]; /* functions that the library has */
};

static _Thread_local CK_MECHANISM_TYPE message_mechanism; /* of the message that this thread hands on */
static _Thread_local struct {
    unsigned remote, row;
    bool late;
} last_call; /* through a stub, by this thread: what its answer does not say */
static struct remote remotes[HA_MAX_REMOTES];
static pthread_mutex_t remotes_lock = PTHREAD_MUTEX_INITIALIZER; /* of `used` */
static unsigned last_used;

/* ---- fork: the child has none of it ---- */

static void before_fork(void)
{
    pthread_mutex_lock(&remotes_lock);
    for (unsigned r = 0; r < HA_MAX_REMOTES; r++) pthread_mutex_lock(&remotes[r].lock);
    ha_hands_before_fork();
}

static void after_fork_in_parent(void)
{
    ha_hands_after_fork(false);
    for (unsigned r = 0; r < HA_MAX_REMOTES; r++) pthread_mutex_unlock(&remotes[r].lock);
    pthread_mutex_unlock(&remotes_lock);
}

static void close_fd(int *fd)
{
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

/* `left`: its other end may be in the middle of a call. */
static void channel_free(struct ha_channel *channel, bool left)
{
    ha_message_free(&channel->message);
    ha_line_close(&channel->line);
    if (channel->hand) ha_hand_release(channel->hand, left);
    free(channel);
}

static void prepare_remote(struct remote *remote)
{
    pthread_condattr_t monotonic;
    pthread_mutex_init(&remote->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&remote->given, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void after_fork_in_child(void)
{
    ha_hands_after_fork(true);
    for (unsigned r = 0; r < HA_MAX_REMOTES; r++) {
        struct remote *remote = &remotes[r];
        while (remote->channels) {
            struct ha_channel *channel = remote->channels;
            remote->channels = channel->next;
            ha_line_forget(&channel->line); /* closed, not shut down: the parent goes on with its own descriptors */
            channel_free(channel, false);
        }
        if (remote->used) {
            close_fd(&remote->control);
            close_fd(&remote->pidfd);
        }
        if (remote->hands) ha_hands_release(remote->hands);
        remote->hands = NULL;
        remote->used = remote->alive = false;
        remote->idle = 0;
        remote->life++;
        prepare_remote(remote);
    }
    pthread_mutex_init(&remotes_lock, NULL);
}

/* From the start, so that these locks are taken last: calls that a fork waits for need them to end. */
__attribute__((constructor)) static void prepare(void)
{
    for (unsigned r = 0; r < HA_MAX_REMOTES; r++) {
        prepare_remote(&remotes[r]);
        remotes[r].control = remotes[r].pidfd = -1;
    }
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* ---- life and death ---- */

/* The number least recently used: a call that is late in an old stub finds nobody rather than somebody else. */
int ha_remote_new(void)
{
    int found = -1;
    pthread_mutex_lock(&remotes_lock);
    for (unsigned k = 1; k <= HA_MAX_REMOTES && found < 0; k++) {
        unsigned r = (last_used + k) % HA_MAX_REMOTES;
        if (remotes[r].used) continue;
        found = (int)r;
        last_used = r;
        remotes[r].used = true;
        remotes[r].most = 0;
    }
    pthread_mutex_unlock(&remotes_lock);
    return found;
}

void ha_remote_free(int number)
{
    struct remote *remote = &remotes[number];
    ha_remote_kill(number);
    pthread_mutex_lock(&remotes_lock);
    pthread_mutex_lock(&remote->lock);
    if (remote->hands) ha_hands_release(remote->hands);
    remote->hands = NULL;
    pthread_mutex_unlock(&remote->lock);
    remote->used = false;
    pthread_mutex_unlock(&remotes_lock);
}

static void unlink_channel(struct remote *remote, const struct ha_channel *channel)
{
    struct ha_channel **at = &remote->channels;
    while (*at && *at != channel) at = &(*at)->next;
    if (*at) *at = channel->next;
}

/* Whether a worker that has ended is a child of this process, which nobody here knows of. */
static bool takes_in_orphans(void)
{
    int subreaper = 0;
    prctl(PR_GET_CHILD_SUBREAPER, &subreaper);
    return subreaper || getpid() == 1;
}

/* With its lock held: the worker dies, idle channels go, calls in flight wake up. */
static void kill_locked(struct remote *remote)
{
    if (!remote->alive) return;
    remote->alive = false;
    close_fd(&remote->control); /* its end as well, where we have not got the right to kill it any more */
    if (remote->pidfd >= 0) {
        siginfo_t info;
        /* With what its library has started, whose group it leads; before Linux 6.9 it alone. */
        bool killed = syscall(SYS_pidfd_send_signal, remote->pidfd, SIGKILL, NULL, PIDFD_SIGNAL_PROCESS_GROUP) == 0 ||
                      syscall(SYS_pidfd_send_signal, remote->pidfd, SIGKILL, NULL, 0) == 0;
        if (killed && takes_in_orphans()) waitid((idtype_t)P_PIDFD, (id_t)remote->pidfd, &info, WEXITED);
    }
    close_fd(&remote->pidfd);
    for (struct ha_channel *channel = remote->channels, *next; channel; channel = next) {
        next = channel->next;
        if (channel->in_use) {
            shutdown(channel->line.peer.socket, SHUT_RDWR);
        } else {
            unlink_channel(remote, channel);
            channel_free(channel, false);
        }
    }
    remote->idle = 0;
    pthread_cond_broadcast(&remote->given);
}

void ha_remote_kill(int number)
{
    pthread_mutex_lock(&remotes[number].lock);
    kill_locked(&remotes[number]);
    pthread_mutex_unlock(&remotes[number].lock);
}

int ha_remote_alive(int number)
{
    pthread_mutex_lock(&remotes[number].lock);
    int alive = remotes[number].alive;
    pthread_mutex_unlock(&remotes[number].lock);
    return alive;
}

/* ---- channels ---- */

/* Hands the other end of a line to the worker; false: it is gone or does not listen. */
static bool hand_over(int control, const int handed[HA_LINE_FDS])
{
    const size_t size = HA_LINE_FDS * sizeof(int);
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(HA_LINE_FDS * sizeof(int))];
    } ancillary = {0};
    struct iovec iov = {"c", 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &ancillary};
    message.msg_controllen = sizeof ancillary.space;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(header), handed, size);
    ssize_t sent;
    while ((sent = sendmsg(control, &message, MSG_NOSIGNAL | MSG_DONTWAIT)) < 0 && errno == EINTR) {
    }
    return sent == 1;
}

/* With the remote's lock held; NULL: no memory or descriptors, or the remote is dead. */
static struct ha_channel *new_channel(struct remote *remote)
{
    int handed[HA_LINE_FDS];
    bool reached = false;
    struct ha_channel *channel = calloc(1, sizeof *channel);
    if (!channel || !ha_line_make(&channel->line, handed)) {
        free(channel);
        return NULL;
    }
    if (remote->hands) {
        channel->hand = ha_hand_new(remote->hands, remote->functions, handed);
    } else {
        reached = hand_over(remote->control, handed);
        for (unsigned k = 0; k < HA_LINE_FDS; k++) close(handed[k]);
        channel->line.peer.process = remote->pidfd;
    }
    if (!channel->hand && !reached) {
        channel_free(channel, false);
        if (!remote->hands) kill_locked(remote);
        return NULL;
    }
    channel->life = remote->life;
    channel->next = remote->channels;
    return remote->channels = channel;
}

/* Threads of the application's process are not without number, and some libraries take one call at a time: so a call
 * waits for a channel. */
static bool is_full(const struct remote *remote)
{
    unsigned count = 0;
    if (!remote->most || remote->idle) return false;
    for (const struct ha_channel *channel = remote->channels; channel; channel = channel->next) count++;
    return count >= remote->most;
}

/* Not into another life: there the call's handles would mean something else. */
static bool wait_for_channel(struct remote *remote, uint64_t until)
{
    const uint32_t life = remote->life;
    const struct timespec time = {(time_t)(until / 1000000000U), (long)(until % 1000000000U)};
    while (remote->alive && remote->life == life && is_full(remote)) {
        if (!until)
            pthread_cond_wait(&remote->given, &remote->lock);
        else if (pthread_cond_timedwait(&remote->given, &remote->lock, &time) == ETIMEDOUT)
            return false;
    }
    return remote->alive && remote->life == life;
}

/* A channel for one call, and until when it may take; NULL: the remote is dead, or has none for us. */
static struct ha_channel *channel_take(struct remote *remote, unsigned deadline, uint64_t *until)
{
    struct ha_channel *channel = NULL;
    pthread_mutex_lock(&remote->lock);
    const uint64_t limit_ms = remote->limits_ms[deadline];
    *until = limit_ms ? ha_monotonic_ns() + limit_ms * UINT64_C(1000000) : 0;
    if (remote->alive && wait_for_channel(remote, *until)) {
        for (channel = remote->channels; channel && channel->in_use;) channel = channel->next;
        if (channel)
            remote->idle--;
        else
            channel = new_channel(remote);
        if (channel) channel->in_use = true;
    }
    pthread_mutex_unlock(&remote->lock);
    return channel;
}

static void channel_give(struct remote *remote, struct ha_channel *channel, bool broken)
{
    ha_message_wipe(&channel->message);
    pthread_mutex_lock(&remote->lock);
    bool current = remote->alive && channel->life == remote->life;
    /* It leaves this one to us.  Where calls take turns, nobody else's can come any more. */
    if (broken && current && (!remote->hands || remote->most == 1)) kill_locked(remote);
    if (broken || !current || remote->idle == IDLE_CHANNELS) {
        unlink_channel(remote, channel);
        channel_free(channel, broken);
    } else {
        channel->in_use = false;
        remote->idle++;
    }
    if (remote->most) pthread_cond_signal(&remote->given);
    pthread_mutex_unlock(&remote->lock);
}

/* ---- starting and connecting ---- */

/* One message without a call: who the worker is and which functions it has. */
static bool greet(struct remote *remote, const char *what, struct ha_peer peer, uint64_t deadline, char *error,
                  size_t error_size)
{
    struct ha_message hello = {0};
    enum ha_wire_result result = ha_receive(peer, &hello, HELLO_LIMIT, deadline);
    CK_ULONG version_size = 0, why_size = 0, has_size = 0;
    const char *version = NULL, *why = NULL, *has = NULL;
    bool is_worker = result == HA_WIRE_DONE && ha_frame_of(&hello).row == HA_WIRE_HELLO;
    if (is_worker) version = ha_get_bytes(&hello, &version_size);
    bool same = version && version_size == strlen(ha_wire_version) && !memcmp(version, ha_wire_version, version_size);
    if (same) {
        why = ha_get_bytes(&hello, &why_size);
        remote->major = (unsigned)ha_get(&hello);
        remote->minor = (unsigned)ha_get(&hello);
        has = ha_get_bytes(&hello, &has_size);
        if (has && has_size == sizeof remote->has) memcpy(remote->has, has, has_size);
    }
    bool fine = same && ha_message_is_read(&hello) && !why_size && has_size == sizeof remote->has;
    if (result == HA_WIRE_LATE)
        snprintf(error, error_size, "%s: the worker does not answer", what);
    else if (result == HA_WIRE_GONE)
        snprintf(error, error_size, "%s: the worker ended before it answered", what);
    else if (is_worker && !same)
        snprintf(error, error_size, "%s: the worker is of another version", what);
    else if (same && why_size)
        snprintf(error, error_size, "%.*s", why_size < 400 ? (int)why_size : 400, why);
    else if (!fine)
        snprintf(error, error_size, "%s: what answers is no worker", what);
    ha_message_free(&hello);
    return fine;
}

static int begin_life(struct remote *remote, const char *what, int fd, int pidfd, const unsigned *limits_ms,
                      char *error, size_t error_size)
{
    uint64_t deadline = ha_monotonic_ns() + limits_ms[HA_DEADLINE_CONNECT] * UINT64_C(1000000);
    bool fine = greet(remote, what, (struct ha_peer){fd, pidfd}, deadline, error, error_size);
    pthread_mutex_lock(&remote->lock);
    kill_locked(remote);
    remote->control = fd;
    remote->pidfd = pidfd;
    memcpy(remote->limits_ms, limits_ms, sizeof remote->limits_ms);
    remote->life++;
    remote->alive = true;
    if (!fine) kill_locked(remote);
    pthread_mutex_unlock(&remote->lock);
    return fine;
}

struct birth {
    char **argv, **envp;
    char *stack; /* of the worker until it has a program of its own */
    int control;
    pid_t pid;
    int error;
};

/* In the new process, which shares our memory until it has loaded the worker; its stack is none that a sanitizer knows. */
__attribute__((no_sanitize_address)) static int become_worker(void *argument)
{
    struct birth *birth = argument;
    int control = fcntl(birth->control, F_DUPFD, HA_WIRE_FD + 1), null = open("/dev/null", O_RDWR);
    setsid(); /* Ctrl-C at the application's terminal is not for it */
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        dup2(null, STDOUT_FILENO);
        if (fcntl(STDERR_FILENO, F_GETFD) < 0) dup2(null, STDERR_FILENO);
    }
    if (control >= 0 && dup2(control, HA_WIRE_FD) >= 0) execve(birth->argv[0], birth->argv, birth->envp);
    birth->error = errno;
    _exit(127);
}

__attribute__((no_sanitize_address)) static int give_birth(void *argument)
{
    struct birth *birth = argument;
    birth->pid = clone(become_worker, birth->stack + STACK, CLONE_VM | CLONE_VFORK | SIGCHLD, birth);
    if (birth->pid < 0) birth->error = errno;
    _exit(0);
}

/*
 * A child of a child that ends at once, so that the worker is nobody's child here: the application's own waitpid()
 * and SIGCHLD never hear of it.  The one between has no exit signal, which hides it from waitpid(-1).  No fork
 * handler runs, and no page is copied: both have our memory until the worker has its own.
 */
static pid_t spawn(char **argv, char **envp, int control, int *error)
{
    char *stacks = mmap(NULL, 2 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stacks == MAP_FAILED) {
        *error = errno;
        return -1;
    }
    struct birth birth = {.argv = argv, .envp = envp, .stack = stacks, .control = control};
    sigset_t all, before;
    int cancel;
    sigfillset(&all);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* no handler of the application runs in the children */
    pid_t between = clone(give_birth, stacks + 2 * STACK, CLONE_VM | CLONE_VFORK, &birth);
    if (between < 0)
        birth.error = errno;
    else
        while (waitpid(between, NULL, (int)__WCLONE) < 0 && errno == EINTR) {
        }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_setcancelstate(cancel, NULL);
    munmap(stacks, 2 * STACK);
    *error = birth.error;
    return birth.error ? -1 : birth.pid;
}

/* Our own entries, the others, and NULL; the entries are not copied.  NULL: no memory. */
static char **listed(char *const *own, size_t count, char **others)
{
    size_t n = 0;
    while (others[n]) n++;
    char **list = calloc(count + n + 1, sizeof *list);
    if (!list) return NULL;
    memcpy(list, own, count * sizeof *list);
    memcpy(list + count, others, n * sizeof *list);
    return list;
}

/*
 * `arguments` are the worker's after the number of its parent, its module first; `environment` is all that it gets.
 * Both end with NULL.  0 with one line in `error`.
 */
int ha_remote_start(int number, char **arguments, char **environment, unsigned *limits_ms, char *error,
                    size_t error_size)
{
    struct remote *remote = &remotes[number];
    char parent[16];
    char *const program[] = {HA_WORKER, "--parent", parent}, *const marks[] = {INSIDE_A_WORKER "=1"};
    int ends[2], why = 0;
    ha_remote_kill(number);
    if (getenv(INSIDE_A_WORKER)) {
        snprintf(error, error_size, "%s: a worker starts no workers", arguments[0]);
        return 0;
    }
    snprintf(parent, sizeof parent, "%d", (int)getpid());
    char **argv = listed(program, 3, arguments), **envp = listed(marks, 1, environment);
    if (!argv || !envp || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        snprintf(error, error_size, "no worker: %s", strerror(errno));
        free(argv);
        free(envp);
        return 0;
    }
    pid_t pid = spawn(argv, envp, ends[1], &why);
    free(argv);
    free(envp);
    close(ends[1]);
    if (pid < 0) {
        snprintf(error, error_size, "%s: %s", HA_WORKER, strerror(why));
        close(ends[0]);
        return 0;
    }
    /* It may be dead, and another have its number: but who greets through our socket after this was alive then. */
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    char go = HA_WIRE_GO;
    if (send(ends[0], &go, 1, MSG_NOSIGNAL) != 1) close_fd(&pidfd);
    return begin_life(remote, arguments[0], ends[0], pidfd, limits_ms, error, error_size);
}

static bool is_trusted(int fd)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return false;
    return geteuid() == 0 || peer.uid == 0 || peer.uid == geteuid();
}

/* 0 with one line in `error`. */
int ha_remote_connect(int number, char *path, unsigned *limits_ms, char *error, size_t error_size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    ha_remote_kill(number);
    if (strlen(path) >= sizeof address.sun_path) {
        snprintf(error, error_size, "%s: too long for a socket", path);
        return 0;
    }
    memcpy(address.sun_path, path, strlen(path));
    /* Not blocking: a worker that is stopped and has a full queue must not hold us. */
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        snprintf(error, error_size, "%s: %s", path, strerror(errno));
        close_fd(&fd);
        return 0;
    }
    if (!is_trusted(fd)) {
        snprintf(error, error_size, "%s: its worker belongs to somebody else", path);
        close_fd(&fd);
        return 0;
    }
    char go = HA_WIRE_GO;
    if (send(fd, &go, 1, MSG_NOSIGNAL) != 1) { /* its end is seen when it is to greet */
    }
    return begin_life(&remotes[number], path, fd, -1, limits_ms, error, error_size);
}

/* A library of this process: its functions, called by threads of ours from now on. */
int ha_remote_here(int number, ha_library *library, void *list, unsigned count, unsigned *limits_ms)
{
    struct remote *remote = &remotes[number];
    pthread_mutex_lock(&remote->lock);
    kill_locked(remote);
    if (!remote->hands) remote->hands = ha_hands_new();
    if (!remote->most) remote->most = HANDS;
    for (unsigned row = 0; row < HA_FUNCTIONS; row++) {
        remote->functions[row] = row < count && serve_rows[row] ? ha_library_function(library, list, row) : NULL;
        remote->has[row] = remote->functions[row] != NULL;
    }
    memcpy(remote->limits_ms, limits_ms, sizeof remote->limits_ms);
    remote->life++;
    remote->alive = remote->hands;
    pthread_mutex_unlock(&remote->lock);
    return remote->alive;
}

/* From now on its library is given one call at a time; to wait for the turn counts in the limit of a call. */
void ha_remote_take_turns(int number)
{
    pthread_mutex_lock(&remotes[number].lock);
    remotes[number].most = 1;
    pthread_mutex_unlock(&remotes[number].lock);
}

unsigned ha_remote_left_behind(int number)
{
    pthread_mutex_lock(&remotes[number].lock);
    unsigned left = remotes[number].hands ? ha_hands_left(remotes[number].hands) : 0;
    pthread_mutex_unlock(&remotes[number].lock);
    return left;
}

/* A worker's library is finalised politely, but not for longer than it deserves. */
void ha_remote_stop(int number)
{
    struct ha_exchange x;
    struct remote *remote = &remotes[number];
    if (ha_remote_alive(number)) {
        pthread_mutex_lock(&remote->lock);
        unsigned *limit_ms = &remote->limits_ms[HA_DEADLINE_INFORMATION];
        if (!*limit_ms || *limit_ms > FAREWELL_MS) *limit_ms = FAREWELL_MS;
        pthread_mutex_unlock(&remote->lock);
        if (ha_ask(&x, (unsigned)number, FN_C_Finalize, HA_DEADLINE_INFORMATION)) ha_answered(&x);
        ha_asked(&x);
    }
    ha_remote_kill(number);
}

void *ha_remote_function(int number, unsigned row)
{
    if (row >= HA_FUNCTIONS || !remotes[number].has[row]) return NULL;
    return ha_remote_stubs[number][row];
}

void ha_remote_version(int number, unsigned *major, unsigned *minor)
{
    *major = remotes[number].major;
    *minor = remotes[number].minor;
}

/* ---- calls: the request ---- */

bool ha_ask(struct ha_exchange *x, unsigned remote, unsigned row, unsigned deadline)
{
    *x = (struct ha_exchange){.remote = remote, .row = row, .rv = CKR_DEVICE_ERROR};
    x->channel = channel_take(&remotes[remote], deadline, &x->until);
    last_call.remote = remote;
    last_call.row = row;
    last_call.late = !x->channel && x->until && ha_monotonic_ns() >= x->until;
    if (last_call.late) x->rv = CKR_DEVICE_REMOVED; /* no thread of ours came free */
    if (!x->channel) return false;
    x->message = &x->channel->message;
    x->expected = sizeof(CK_ULONG); /* the return value */
    ha_message_begin(x->message, row, ++x->channel->turn);
    return true;
}

static void refuse(struct ha_exchange *x, CK_RV rv)
{
    if (!x->refused) x->rv = rv;
    x->refused = true;
}

/* The answer may have so many bytes more, with the two words before them. */
static void expect(struct ha_exchange *x, size_t size)
{
    x->expected += 3 * sizeof(CK_ULONG) + size;
    if (x->expected > HA_WIRE_MAX) refuse(x, CKR_HOST_MEMORY);
}

static CK_ULONG room_of(CK_ULONG size)
{
    return size < HA_WIRE_ROOM ? size : HA_WIRE_ROOM;
}

void ha_ask_number(struct ha_exchange *x, CK_ULONG number)
{
    ha_put(x->message, number);
}

void ha_ask_bytes(struct ha_exchange *x, const void *bytes, CK_ULONG size)
{
    ha_put_bytes(x->message, bytes, size);
}

/* Room for an output: NULL asks for its length, and where the length is NULL there is none at all. */
void ha_ask_room(struct ha_exchange *x, const void *bytes, const CK_ULONG *size)
{
    ha_put(x->message, size != NULL);
    ha_put(x->message, bytes != NULL);
    ha_put(x->message, size && bytes ? room_of(*size) : 0);
    expect(x, sizeof(CK_ULONG) + (size && bytes ? room_of(*size) : 0));
}

void ha_ask_fill(struct ha_exchange *x, const void *bytes, CK_ULONG size)
{
    if (size > HA_WIRE_ROOM) refuse(x, CKR_HOST_MEMORY);
    ha_put(x->message, bytes != NULL);
    ha_put(x->message, size);
    expect(x, bytes ? room_of(size) : 0);
}

void ha_ask_result(struct ha_exchange *x, const void *result, size_t size)
{
    ha_put(x->message, result != NULL);
    expect(x, result ? size : 0);
}

/* Of a list: as many elements as there is room for at most. */
static CK_ULONG count_of(CK_ULONG capacity, size_t element)
{
    return capacity < HA_WIRE_ROOM / element ? capacity : HA_WIRE_ROOM / element;
}

void ha_ask_list(struct ha_exchange *x, const void *list, CK_ULONG capacity, size_t element)
{
    capacity = list ? count_of(capacity, element) : 0;
    ha_put(x->message, list != NULL);
    ha_put(x->message, capacity);
    expect(x, sizeof(CK_ULONG) + capacity * element);
}

static void *pointer_at(const void *structure, size_t offset)
{
    void *value;
    memcpy(&value, (const char *)structure + offset, sizeof value);
    return value;
}

static CK_ULONG number_at(const void *structure, size_t offset)
{
    CK_ULONG value;
    memcpy(&value, (const char *)structure + offset, sizeof value);
    return value;
}

static void ask_structure(struct ha_exchange *x, const CK_MECHANISM *mechanism, const struct ha_parameter *layout,
                          const struct ha_written *written)
{
    const char *given = mechanism->pParameter;
    ha_put_bytes(x->message, given, layout->size); /* with pointers in it that mean nothing there */
    for (unsigned k = 0; k < layout->buffers; k++) {
        CK_ULONG size = number_at(given, layout->buffer[k].length);
        ha_put_bytes(x->message, pointer_at(given, layout->buffer[k].pointer), size);
        if (written && written->buffers >> k & 1) expect(x, size);
    }
    if (!layout->made) return;
    const void *made = pointer_at(given, layout->made_pointer);
    ha_put(x->message, made != NULL);
    if (!made) return;
    expect(x, layout->made * sizeof(CK_ULONG));
    for (unsigned k = 0; k < written->ivs; k++) {
        bool wanted = pointer_at(made, written->iv[k]) != NULL;
        ha_put(x->message, wanted);
        if (wanted) expect(x, ha_iv_size(written, given));
    }
}

/* A parameter whose layout is not known may hold pointers: it cannot leave this process. */
void ha_ask_mechanism(struct ha_exchange *x, const CK_MECHANISM *mechanism)
{
    ha_put(x->message, mechanism != NULL);
    if (!mechanism) return;
    ha_put(x->message, mechanism->mechanism);
    if (!mechanism->pParameter || !mechanism->ulParameterLen) {
        ha_put_bytes(x->message, mechanism->pParameter, mechanism->ulParameterLen);
        return;
    }
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    const struct ha_written *written = ha_written_by(mechanism->mechanism);
    if (!layout || (written && written->refused) || (layout->size && layout->size != mechanism->ulParameterLen)) {
        refuse(x, CKR_MECHANISM_PARAM_INVALID);
    } else if (!layout->size || (!layout->buffers && !layout->made)) {
        ha_put_bytes(x->message, mechanism->pParameter, mechanism->ulParameterLen);
    } else {
        ha_put(x->message, HA_SENT_PARTS);
        ask_structure(x, mechanism, layout, written);
    }
}

static void ask_attributes(struct ha_exchange *x, const CK_ATTRIBUTE *attributes, CK_ULONG count, bool answers,
                           unsigned depth)
{
    ha_put(x->message, attributes != NULL);
    ha_put(x->message, count);
    for (CK_ULONG k = 0; attributes && k < count && !x->refused && !x->message->no_memory; k++) {
        const CK_ATTRIBUTE *attribute = &attributes[k];
        const void *value = attribute->pValue;
        CK_ULONG size = attribute->ulValueLen;
        bool parts = value && size && ha_attribute_has_parts(attribute->type);
        ha_put(x->message, attribute->type);
        if (value && size && (!ha_attribute_is_carried(attribute->type) || (parts && depth == HA_WIRE_DEPTH))) {
            refuse(x, CKR_ATTRIBUTE_TYPE_INVALID);
        } else if (parts) {
            ha_put(x->message, HA_SENT_PARTS);
            ha_put(x->message, size);
            ask_attributes(x, value, size / sizeof(CK_ATTRIBUTE), answers, depth + 1);
        } else if (!answers) {
            ha_put_bytes(x->message, value, size);
        } else {
            ha_put(x->message, value ? HA_SENT_BYTES : HA_SENT_NULL);
            ha_put(x->message, value ? room_of(size) : size);
            expect(x, value ? room_of(size) : 0);
        }
        if (answers) expect(x, 0);
    }
}

void ha_ask_template(struct ha_exchange *x, const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    ask_attributes(x, attributes, count, false, 0);
}

void ha_ask_answers(struct ha_exchange *x, const CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    expect(x, 0);
    ask_attributes(x, attributes, count, true, 0);
}

/* One of the mechanism's own may be meant, or one of a message, and both may be of one size: it is not guessed. */
void ha_ask_message_mechanism(struct ha_exchange *x, const CK_MECHANISM *mechanism)
{
    bool has_parameter = mechanism && mechanism->pParameter && mechanism->ulParameterLen;
    if (has_parameter && ha_message_parameter_of(mechanism->mechanism))
        refuse(x, CKR_MECHANISM_PARAM_INVALID);
    else
        ha_ask_mechanism(x, mechanism);
}

void ha_message_of(const ha_call *call)
{
    message_mechanism = call->session->operation[__builtin_ctz(ha_rows[call->row].ops)].mechanism.mechanism;
}

/* Of a mechanism that we do not know it may hold pointers, which cannot leave this process. */
void ha_ask_parameter(struct ha_exchange *x, const void *parameter, CK_ULONG size)
{
    if (!parameter || !size) {
        ha_put_bytes(x->message, parameter, size);
        return;
    }
    const struct ha_message_parameter *layout = ha_message_parameter_of(message_mechanism);
    if (!layout || layout->size != size) {
        refuse(x, CKR_MECHANISM_PARAM_INVALID);
        return;
    }
    x->parameter = layout;
    ha_put(x->message, HA_SENT_PARTS);
    ha_put(x->message, message_mechanism);
    ha_put_bytes(x->message, parameter, size); /* with pointers in it that mean nothing there */
    for (unsigned k = 0; k < layout->buffers; k++) {
        CK_ULONG length = ha_message_buffer_size(layout, k, parameter);
        ha_put_bytes(x->message, pointer_at(parameter, layout->buffer[k].pointer), length);
        expect(x, room_of(length));
    }
}

void ha_ask_initialize(struct ha_exchange *x, const CK_C_INITIALIZE_ARGS *args)
{
    const char *reserved = args ? args->pReserved : NULL;
    ha_put(x->message, args ? args->flags : 0);
    ha_put_bytes(x->message, reserved, reserved ? strlen(reserved) + 1 : 0);
}

/* ---- calls: the answer ---- */

bool ha_answered(struct ha_exchange *x)
{
    struct ha_message *message = x->message;
    if (!x->refused && (message->no_memory || message->end > HA_WIRE_MAX)) refuse(x, CKR_HOST_MEMORY);
    if (x->refused) return false;
    enum ha_wire_result result = ha_line_ask(&x->channel->line, message, x->expected, x->until);
    last_call.late = result == HA_WIRE_LATE;
    if (result == HA_WIRE_DONE) {
        struct ha_frame frame = ha_frame_of(message);
        message->broken = frame.row != x->row || frame.turn != x->channel->turn;
        x->rv = ha_get(message);
        if (!message->broken) return true;
    }
    message->broken = true;
    return false;
}

/* Bytes of the answer into the caller's memory, which has room for `room`; true: `size` of them. */
static bool take_bytes(struct ha_exchange *x, void *bytes, CK_ULONG room, CK_ULONG *size)
{
    const void *sent = ha_get_bytes(x->message, size);
    if (!sent || !bytes) {
        if (sent) x->message->broken = true; /* not asked for */
        return false;
    }
    if (*size > room) {
        x->message->broken = true;
        return false;
    }
    memcpy(bytes, sent, *size);
    return true;
}

void ha_take_room(struct ha_exchange *x, void *bytes, CK_ULONG *size)
{
    CK_ULONG length = ha_get(x->message), sent = 0;
    bool filled = take_bytes(x, bytes, size ? *size : 0, &sent);
    if (filled ? sent != length : x->rv == CKR_OK && bytes) x->message->broken = true;
    if (size && !x->message->broken) *size = length;
}

void ha_take_fill(struct ha_exchange *x, void *bytes, CK_ULONG size)
{
    CK_ULONG sent = 0;
    bool filled = take_bytes(x, bytes, size, &sent);
    if (filled ? sent != size : x->rv == CKR_OK && bytes) x->message->broken = true;
}

void ha_take_result(struct ha_exchange *x, void *result, size_t size)
{
    ha_take_fill(x, result, size);
}

/* As many as `count` says; with no list, or too small a one, only that is said. */
void ha_take_list(struct ha_exchange *x, void *list, CK_ULONG *count, CK_ULONG capacity, size_t element)
{
    CK_ULONG length = ha_get(x->message), sent = 0;
    capacity = count_of(capacity, element);
    bool filled = take_bytes(x, list, capacity * element, &sent);
    if (filled ? length > capacity || sent != length * element : x->rv == CKR_OK && list) x->message->broken = true;
    if (count && !x->message->broken) *count = length;
}

void ha_take_mechanism(struct ha_exchange *x, const CK_MECHANISM *mechanism)
{
    const struct ha_written *written = mechanism ? ha_written_by(mechanism->mechanism) : NULL;
    if (!written || !mechanism->pParameter || !mechanism->ulParameterLen) return;
    const struct ha_parameter *layout = ha_parameter_of(mechanism->mechanism);
    char *given = mechanism->pParameter;
    for (unsigned k = 0; k < layout->buffers; k++)
        if (written->buffers >> k & 1)
            ha_take_fill(x, pointer_at(given, layout->buffer[k].pointer), number_at(given, layout->buffer[k].length));
    char *made = layout->made ? pointer_at(given, layout->made_pointer) : NULL;
    for (unsigned k = 0; made && k < layout->made; k++) {
        CK_OBJECT_HANDLE object = ha_get(x->message);
        if (!x->message->broken && x->rv == CKR_OK) memcpy(made + layout->made_handle[k], &object, sizeof object);
    }
    for (unsigned k = 0; made && k < written->ivs; k++)
        ha_take_fill(x, pointer_at(made, written->iv[k]), ha_iv_size(written, given));
}

/* What the member has not changed is not written: who decrypts may have it where nothing can be. */
void ha_take_parameter(struct ha_exchange *x, const void *parameter)
{
    for (unsigned k = 0; x->parameter && k < x->parameter->buffers; k++) {
        CK_ULONG size = ha_message_buffer_size(x->parameter, k, parameter), sent;
        void *bytes = pointer_at(parameter, x->parameter->buffer[k].pointer);
        const void *written = ha_get_bytes(x->message, &sent);
        if (written ? !bytes || sent != size : x->rv == CKR_OK && bytes) x->message->broken = true;
        if (x->message->broken) return;
        if (written && memcmp(bytes, written, size) != 0) memcpy(bytes, written, size);
    }
}

/* The types of a template inside an attribute are the member's to say, those of the caller's own are not. */
static void take_attributes(struct ha_exchange *x, CK_ATTRIBUTE *attributes, CK_ULONG count, bool inside)
{
    for (CK_ULONG k = 0; attributes && k < count && !x->message->broken; k++) {
        CK_ATTRIBUTE *attribute = &attributes[k];
        CK_ULONG capacity = attribute->ulValueLen, length, sent;
        CK_ATTRIBUTE_TYPE type = ha_get(x->message);
        bool parts = attribute->pValue && capacity && ha_attribute_has_parts(attribute->type);
        length = ha_get(x->message);
        if (parts && length <= capacity)
            take_attributes(x, attribute->pValue, length / sizeof(CK_ATTRIBUTE), true);
        else if (!parts && attribute->pValue && length <= capacity &&
                 !take_bytes(x, attribute->pValue, capacity, &sent))
            x->message->broken = true;
        else if (!parts && attribute->pValue && length <= capacity && sent != length)
            x->message->broken = true;
        else if (x->rv == CKR_OK && attribute->pValue && length > capacity && length != CK_UNAVAILABLE_INFORMATION)
            x->message->broken = true; /* the caller would read as much */
        if (x->message->broken) return;
        if (inside) attribute->type = type;
        attribute->ulValueLen = length;
    }
}

void ha_take_answers(struct ha_exchange *x, CK_ATTRIBUTE *attributes, CK_ULONG count)
{
    bool answered = attributes && ha_attributes_are_answered(x->rv);
    if (ha_get(x->message) != answered) x->message->broken = true;
    if (answered) take_attributes(x, attributes, count, false);
}

/* Where the member has that stub no more, there was another call since. */
void ha_remote_explain(ha_call *call)
{
    const void *stub = ha_remote_stubs[last_call.remote][last_call.row];
    if (last_call.late && call->target->functions[last_call.row] == stub) call->late |= 1U << call->member;
}

CK_RV ha_asked(struct ha_exchange *x)
{
    if (!x->channel) return x->rv;
    bool broken = !x->refused && !ha_message_is_read(x->message);
    if (broken) x->rv = x->channel->hand ? CKR_DEVICE_REMOVED : CKR_DEVICE_ERROR;
    channel_give(&remotes[x->remote], x->channel, broken);
    return x->rv;
}
