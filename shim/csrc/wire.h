/*
 * Messages between a member's stubs and the worker that has its vendor library: frames, words, bytes, lines.
 *
 * Both ends run on one machine and are built from one table, so numbers and structures travel as they are in
 * memory.  A frame says how long its message is; all else in it is a word of 8 bytes or bytes padded to words.
 * Nothing that was received is believed: reading past the end, or leaving some of it, makes a message `broken`.
 */
#ifndef PKCS11_HA_WIRE_H
#define PKCS11_HA_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ha.h"

enum {
    HA_WIRE_HELLO = HA_FUNCTIONS, /* the row of a worker's first message */
    HA_WIRE_GO = 'g',             /* the client's first byte: it has a hold of the worker now */
    HA_WIRE_FD = 3,               /* where a worker that was started finds its end of the socket */
    HA_WIRE_DEPTH = 4,            /* of templates in templates */
    HA_WIRE_SMALL = 1 << 14,      /* a message that is kept mapped and locked between calls */
};
#define HA_WIRE_MAX ((size_t)1 << 30)  /* of one message */
#define HA_WIRE_ROOM ((size_t)1 << 28) /* of one output: more than any caller has */
#define HA_WIRE_LISTEN_BACKLOG 128

struct ha_frame {
    uint32_t row;  /* of the function */
    uint32_t turn; /* of the channel: an answer carries that of its request */
    uint64_t size; /* of what follows */
};

struct ha_message {
    unsigned char *bytes; /* the frame first */
    size_t room;
    size_t end; /* written or received */
    size_t at;  /* read */
    bool broken;
    bool no_memory;
};

/* The other end.  What its library has started may keep its socket open when it has died, so its process is watched. */
struct ha_peer {
    int socket;
    int process; /* a pidfd, not ours to close; -1: not known */
};

enum ha_wire_result { HA_WIRE_DONE, HA_WIRE_GONE, HA_WIRE_LATE, HA_WIRE_MALFORMED };

/* How a value that may be NULL, an array or a structure is sent. */
enum { HA_SENT_NULL, HA_SENT_BYTES, HA_SENT_PARTS };

/* What a member writes through a mechanism's parameter, beyond the handles it makes. */
struct ha_written {
    bool refused;     /* it holds pointers that its layout does not tell of */
    uint32_t buffers; /* those it writes into, by bit */
    size_t made_size; /* of the structure that takes the handles */
    unsigned ivs;     /* pointers in that structure to as many bits as a field of the parameter says */
    size_t iv[2], iv_bits;
};
const struct ha_written *ha_written_by(CK_MECHANISM_TYPE type);               /* generated; NULL: nothing */
CK_ULONG ha_iv_size(const struct ha_written *written, const void *parameter); /* in bytes, as both ends count them */

/* What a parameter of a message (PKCS#11 3.0) points to; `bytes` is the length where no field has it. */
struct ha_message_parameter {
    size_t size, generator; /* where it says who makes its IV; 0: it does not */
    unsigned buffers;
    struct {
        size_t pointer, length;
        CK_ULONG bytes;
        enum { HA_UNIT_BYTES, HA_UNIT_BITS, HA_UNIT_NONCE } unit; /* of the field */
        bool is_tag;
    } buffer[2];
};
const struct ha_message_parameter *ha_message_parameter_of(CK_MECHANISM_TYPE type); /* generated; NULL: none known */
CK_ULONG ha_message_buffer_size(const struct ha_message_parameter *layout, unsigned buffer, const void *parameter);

void ha_message_begin(struct ha_message *message, uint32_t row, uint32_t turn);
void ha_message_wipe(struct ha_message *message); /* and shrinks it */
void ha_message_free(struct ha_message *message);

void ha_put(struct ha_message *message, CK_ULONG word);
void ha_put_bytes(struct ha_message *message, const void *bytes, CK_ULONG size); /* NULL is told from empty */
CK_ULONG ha_get(struct ha_message *message);
void *ha_get_bytes(struct ha_message *message, CK_ULONG *size);
bool ha_message_is_read(const struct ha_message *message); /* whole, and well formed */

void ha_message_measure(struct ha_message *message); /* tells its frame */
/* A copy of `size` bytes, measured, with a frame that says so; false: it is not that, or there is no memory. */
bool ha_message_copy(struct ha_message *message, const void *bytes, size_t size);

/* `deadline` in monotonic ns, 0: none. */
uint64_t ha_monotonic_ns(void);
enum ha_wire_result ha_wait(struct ha_peer peer, short event, uint64_t deadline);
enum ha_wire_result ha_send(struct ha_peer peer, struct ha_message *message, uint64_t deadline);
enum ha_wire_result ha_receive(struct ha_peer peer, struct ha_message *message, size_t limit, uint64_t deadline);
struct ha_frame ha_frame_of(const struct ha_message *message);

void *ha_secret_pages(size_t size); /* zeroed; not in core dumps nor in children; NULL: no memory */
bool ha_attributes_are_answered(CK_RV rv);
bool ha_attribute_has_parts(CK_ATTRIBUTE_TYPE type);  /* its value is a template; generated from the header's names */
bool ha_attribute_is_carried(CK_ATTRIBUTE_TYPE type); /* its value holds no pointers that we know nothing of */

/* ---- line.c: the two ends of a channel ---- */
enum { HA_LINE_FDS = 2 }; /* that are handed over: socket, memory */

struct ha_line {
    struct ha_boxes *boxes; /* shared with the other end */
    struct ha_peer peer;
    unsigned in_vain, skip; /* looks for a message before sleeping: that did not pay, to be left out */
};

bool ha_line_make(struct ha_line *line, int handed[HA_LINE_FDS]);
bool ha_line_take(struct ha_line *line, const int handed[HA_LINE_FDS]); /* owns them, whatever it answers */
void ha_line_close(struct ha_line *line);
void ha_line_forget(struct ha_line *line); /* in a child of a fork, which has the socket alone */
/* The asking end: `message` becomes its answer, of at most `limit` bytes. */
enum ha_wire_result ha_line_ask(struct ha_line *line, struct ha_message *message, size_t limit, uint64_t deadline);
/* The serving end. */
enum ha_wire_result ha_line_hear(struct ha_line *line, struct ha_message *request);
enum ha_wire_result ha_line_answer(struct ha_line *line, struct ha_message *answer);

/* ---- hand.c: serving ends in this process ---- */
struct ha_hands *ha_hands_new(void); /* of one remote; NULL: no memory */
void ha_hands_release(struct ha_hands *hands);
unsigned ha_hands_left(struct ha_hands *hands); /* threads in calls that nobody waits for any more */
struct ha_hand *ha_hand_new(struct ha_hands *hands, void *const *functions, const int handed[HA_LINE_FDS]);
void ha_hand_release(struct ha_hand *hand, bool left);
void ha_hands_before_fork(void);
void ha_hands_after_fork(bool child);

/* The messages' version: both ends must have the same. */
extern const char ha_wire_version[];

/* ---- remote.c: the stubs' end ---- */
enum { HA_MAX_REMOTES = 32 };

struct ha_exchange {
    struct ha_channel *channel;
    struct ha_message *message;
    size_t expected; /* what the answer may have at most */
    CK_RV rv;
    uint64_t until; /* monotonic ns, 0: for ever */
    unsigned remote, row;
    bool refused;                                 /* rv says why nothing is sent */
    const struct ha_message_parameter *parameter; /* of the message, if one was sent */
};

bool ha_ask(struct ha_exchange *x, unsigned remote, unsigned row, unsigned deadline); /* HA_DEADLINE_… */
void ha_ask_number(struct ha_exchange *x, CK_ULONG number);
void ha_ask_bytes(struct ha_exchange *x, const void *bytes, CK_ULONG size);
void ha_ask_room(struct ha_exchange *x, const void *bytes, const CK_ULONG *size);
void ha_ask_fill(struct ha_exchange *x, const void *bytes, CK_ULONG size);
void ha_ask_result(struct ha_exchange *x, const void *result, size_t size);
void ha_ask_list(struct ha_exchange *x, const void *list, CK_ULONG capacity, size_t element);
void ha_ask_mechanism(struct ha_exchange *x, const CK_MECHANISM *mechanism);
void ha_ask_message_mechanism(struct ha_exchange *x, const CK_MECHANISM *mechanism);
void ha_ask_template(struct ha_exchange *x, const CK_ATTRIBUTE *attributes, CK_ULONG count);
void ha_ask_answers(struct ha_exchange *x, const CK_ATTRIBUTE *attributes, CK_ULONG count);
void ha_ask_parameter(struct ha_exchange *x, const void *parameter, CK_ULONG size);
void ha_ask_initialize(struct ha_exchange *x, const CK_C_INITIALIZE_ARGS *args);
bool ha_answered(struct ha_exchange *x); /* sends, and waits for the answer */
void ha_take_room(struct ha_exchange *x, void *bytes, CK_ULONG *size);
void ha_take_fill(struct ha_exchange *x, void *bytes, CK_ULONG size);
void ha_take_result(struct ha_exchange *x, void *result, size_t size);
void ha_take_list(struct ha_exchange *x, void *list, CK_ULONG *count, CK_ULONG capacity, size_t element);
void ha_take_mechanism(struct ha_exchange *x, const CK_MECHANISM *mechanism);
void ha_take_parameter(struct ha_exchange *x, const void *parameter);
void ha_take_answers(struct ha_exchange *x, CK_ATTRIBUTE *attributes, CK_ULONG count);
CK_RV ha_asked(struct ha_exchange *x); /* the answer; the channel is free again */

extern void *const ha_remote_stubs[HA_MAX_REMOTES][HA_FUNCTIONS]; /* generated; NULL: never asked of a worker */

#endif
