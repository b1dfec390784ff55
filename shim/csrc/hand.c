/*
 * Hands: threads of this process at the other end of a line, where a member has no worker and its calls have a limit.
 *
 * Each serves one channel of a remote, as a thread of a worker does.  Who waited long enough goes away and leaves the
 * thread inside the vendor's library, with its own copies of all buffers; the thread ends when that call comes back.
 * They block every signal: the application's handlers run elsewhere, and no write to a dead peer kills it.
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "serve.h"

struct ha_hand {
    struct ha_line line;
    struct ha_hands *hands;
    void *functions[HA_FUNCTIONS]; /* of the moment it was made: a call that is late must not go into another life */
    bool left, released, ended;
    struct ha_hand *next;
};

struct ha_hands {
    unsigned count, left;
    bool released;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all that is above */
static struct ha_hand *all;

struct ha_hands *ha_hands_new(void)
{
    return calloc(1, sizeof(struct ha_hands));
}

/* The last thread frees it. */
void ha_hands_release(struct ha_hands *hands)
{
    pthread_mutex_lock(&lock);
    hands->released = true;
    if (!hands->count) free(hands);
    pthread_mutex_unlock(&lock);
}

unsigned ha_hands_left(struct ha_hands *hands)
{
    pthread_mutex_lock(&lock);
    unsigned left = hands->left;
    pthread_mutex_unlock(&lock);
    return left;
}

/* With the lock held: it serves no more. */
static void end(struct ha_hand *hand)
{
    struct ha_hand **at = &all;
    while (*at != hand) at = &(*at)->next;
    *at = hand->next;
    hand->ended = true;
    hand->hands->left -= hand->left;
    if (!--hand->hands->count && hand->hands->released) free(hand->hands);
    if (hand->released) free(hand);
}

static void *serve(void *argument)
{
    struct ha_hand *hand = argument;
    serve_line(&hand->line, hand->functions);
    pthread_mutex_lock(&lock);
    ha_line_close(&hand->line); /* here, so that a fork finds either a descriptor of ours or none */
    end(hand);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static bool start(struct ha_hand *hand)
{
    pthread_t thread;
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_BLOCK, &every, &before);
    bool started = pthread_create(&thread, NULL, serve, hand) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started) pthread_detach(thread);
    return started;
}

/* Owns what it is handed; NULL: no memory, or no thread. */
struct ha_hand *ha_hand_new(struct ha_hands *hands, void *const *functions, const int handed[HA_LINE_FDS])
{
    struct ha_hand *hand = calloc(1, sizeof *hand);
    struct ha_line line;
    if (!ha_line_take(&line, handed) || !hand) {
        ha_line_close(&line);
        free(hand);
        return NULL;
    }
    hand->line = line;
    hand->hands = hands;
    memcpy(hand->functions, functions, sizeof hand->functions);
    pthread_mutex_lock(&lock);
    hand->next = all;
    all = hand;
    hands->count++;
    if (!start(hand)) {
        ha_line_close(&hand->line);
        hand->released = true;
        end(hand);
        hand = NULL;
    }
    pthread_mutex_unlock(&lock);
    return hand;
}

/* Its channel is no more; `left`: while a call was under way. */
void ha_hand_release(struct ha_hand *hand, bool left)
{
    pthread_mutex_lock(&lock);
    hand->released = true;
    if (hand->ended) {
        free(hand);
    } else if (left) {
        hand->left = true;
        hand->hands->left++;
    }
    pthread_mutex_unlock(&lock);
}

/* ---- fork: the child has no thread but its own ---- */

void ha_hands_before_fork(void)
{
    pthread_mutex_lock(&lock);
}

void ha_hands_after_fork(bool child)
{
    while (child && all) {
        ha_line_forget(&all->line);
        end(all);
    }
    if (child)
        pthread_mutex_init(&lock, NULL);
    else
        pthread_mutex_unlock(&lock);
}
