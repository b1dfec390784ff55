/*
 * What passes between the data plane (C) and the core (Python): one text, read by the C compiler and by cffi.
 *
 * It stays within what cffi's parser takes: no preprocessor, no atomics.  Structures with atomics are opaque
 * here; the core works on them through the functions below.  Functions named core_* are the core's, called by
 * the data plane with the session of the call locked; ha_* are the data plane's.
 */

typedef struct ha_member ha_member;   /* a token of a vendor library: function table, epoch, calls in flight */
typedef struct ha_slot ha_slot;       /* a virtual slot: a group, or a member's own slot */
typedef struct ha_session ha_session; /* a virtual session */
typedef struct ha_secret ha_secret;   /* bytes in locked memory that no core dump shows */

enum {
    HA_WHOLE = 100,  /* a member's share of load, in per cent */
    HA_FAULTS = 16,  /* classes of answers, at most */
    HA_BUCKETS = 64, /* of latency */
    HA_WORKS = 256,  /* kinds of work: the first two are functions of one sort, */
    HA_WORK_INFORMATION = 0,
    HA_WORK_GENERATION = 1,
    HA_WORK_COMPARED = 2, /* and from here on, by chance of a hash, cryptography that is like each other, */
    HA_STAGES = 3         /* of an operation: each has every third kind */
};

/* One application call on its way through the members. `member` and `epoch` say where it stands. */
typedef struct ha_call {
    ha_session *session;
    ha_slot *slot;
    ha_member *target; /* the chosen member */
    void *function;    /* of that member */
    CK_SESSION_HANDLE member_session;
    CK_MECHANISM *mechanism;
    CK_MECHANISM *member_mechanism; /* `mechanism`, or a copy of it with the member's handles */
    void *mechanism_copy;
    CK_BYTE *input; /* a copy of what the output would overwrite */
    CK_ULONG input_size;
    CK_RV rv;                          /* the member's answer, at last the application's */
    CK_RV first_rv;                    /* of the first suspect, else of the first that failed */
    unsigned row;                      /* index in the function table */
    int member;                        /* index in the slot's members, -1: none chosen */
    unsigned epoch;                    /* of that member when it was chosen */
    unsigned tried;                    /* members that this call shall not use again */
    unsigned suspects;                 /* members whose failure a success elsewhere would prove */
    unsigned late;                     /* members that have kept it waiting for longer than they may */
    unsigned answered;                 /* members that gave an answer which others may better */
    unsigned repairs;                  /* repairs made for this call (sessions, logins, handles), bit by class */
    unsigned objects;                  /* how many of `object` are used */
    unsigned char sent;                /* the function itself has reached the member */
    unsigned char finished;            /* rv is the answer */
    unsigned char creates_token;       /* the templates ask for a token object */
    unsigned char query;               /* the caller asks for a length only */
    unsigned char translate;           /* the mechanism's parameter holds object handles */
    unsigned char alone;               /* meant for one member: the data plane asks the others itself */
    unsigned char guarded;             /* SIGPIPE: 0 as it was, 1 to unblock, 2 pending before us */
    unsigned char sampled;             /* its time is taken for the status segment, */
    unsigned char compared;            /* and for who compares the members */
    CK_OBJECT_HANDLE object[5];        /* virtual; the arguments, then those inside the mechanism */
    CK_OBJECT_HANDLE member_object[5]; /* the same on the chosen member */
    unsigned long long began_ns;       /* inside the member; 0: its time is not taken */
    unsigned long long size;           /* bytes of input */
} ha_call;

/* ---- members ---- */
ha_member *ha_member_new(void);
void ha_member_free(ha_member *member);
void ha_member_function(ha_member *member, unsigned row, void *function);
void *ha_member_pointer(ha_member *member, unsigned row);
void ha_member_slot(ha_member *member, CK_SLOT_ID slot);
void ha_member_names(ha_member *member, char *name, char *serial);
CK_SLOT_ID ha_member_slot_id(ha_member *member);
void ha_member_traits(ha_member *member, int guard_sigpipe, int one_call_at_a_time);
void ha_member_clean(ha_member *member, unsigned char *clean); /* 512 bytes: 1 = this CKR_* is no fault */
unsigned ha_member_epoch(ha_member *member);
unsigned ha_member_new_epoch(ha_member *member);
int ha_member_in_flight(ha_member *member);
unsigned long long ha_member_calls(ha_member *member);
void ha_member_fault(ha_member *member, unsigned fault_class); /* one more */
unsigned long long ha_member_faults(ha_member *member, unsigned fault_class);
void ha_member_failover(ha_member *member);                  /* one more call goes on elsewhere */
void ha_member_latency(ha_member *member, unsigned *counts); /* HA_WORKS times HA_BUCKETS */
unsigned ha_latency_bucket(unsigned long long ns);
int ha_member_enter(ha_member *member, unsigned epoch, ha_call *call);
void ha_member_leave(ha_member *member, ha_call *call);

/* ---- the status segment ---- */
int ha_segment_open(int file, unsigned long long size);   /* for members made from here on; 0: it cannot be mapped */
int ha_segment_tell(char *text, unsigned long long size); /* 0: there is not so much room */
void ha_segment_close(void);
int ha_member_record(ha_member *member); /* -1: it counts elsewhere */

/* ---- virtual slots ---- */
ha_slot *ha_slot_new(CK_SLOT_ID id, unsigned balance, CK_ULONG replay_limit); /* NULL: too many */
void ha_slot_add(ha_slot *slot, ha_member *member); /* while it works, too: it serves once it is in `serving` */
void ha_slot_order(ha_slot *slot, unsigned char *order, unsigned count); /* members, the primary first */
void ha_slot_balance_by(ha_slot *slot, unsigned balance);
CK_SLOT_ID ha_slot_id(ha_slot *slot);
void ha_slot_serving(ha_slot *slot, unsigned serving, unsigned up);
void ha_slot_check_at(ha_slot *slot, unsigned long long monotonic_ns); /* all ones: no check is due */
void ha_slot_login(ha_slot *slot, CK_ULONG user, int write_protected); /* CK_UNAVAILABLE_INFORMATION: nobody */
CK_ULONG ha_slot_sessions(ha_slot *slot, int read_write);
void ha_slot_look_at(ha_slot *slot, unsigned long long monotonic_ns); /* all ones: calls are not timed */
void ha_slot_share(ha_slot *slot, int member, unsigned share);        /* of HA_WHOLE; 0: only what no other can do */
void ha_slot_try(ha_slot *slot, int member);                          /* one operation for a member of share 0 */
int ha_slot_trial(ha_slot *slot, int member);                         /* 0: it is to come, 1: under way, 2: ended */
void ha_slot_gate(ha_slot *slot);                                     /* the recovery check */
void ha_slot_drain_pools(ha_slot *slot, int read_write);
void ha_slot_drain_pools_of(ha_slot *slot, int member);
void ha_slot_replicates(ha_slot *slot); /* what makes objects goes to the core */

/* ---- virtual sessions ---- */
ha_session *ha_session_find(CK_SESSION_HANDLE session); /* no lock: for the holder of the session's lock */
int ha_session_read_only(ha_session *session);
ha_slot *ha_session_slot(ha_session *session);
CK_SESSION_HANDLE ha_session_handle(ha_session *session);
int ha_session_member(ha_session *session); /* serving the operation under way, -1: none */
unsigned ha_session_active(ha_session *session);
int ha_session_may_move(ha_session *session); /* 1: what is under way may be repeated elsewhere */
unsigned ha_session_keys(const ha_session *session, CK_OBJECT_HANDLE *key, unsigned room);
void ha_session_drop(ha_session *session, int member);
void ha_session_renew(ha_session *session, int member);
void ha_session_own(ha_session *session, int member);

/* ---- virtual objects ---- */
CK_OBJECT_HANDLE ha_object_new(ha_slot *slot);
void ha_object_bind(CK_OBJECT_HANDLE object, int member, unsigned epoch, CK_OBJECT_HANDLE member_object);
void ha_object_unbind(CK_OBJECT_HANDLE object, int member);
void ha_object_absent(CK_OBJECT_HANDLE object, unsigned mask);
void ha_object_prefer(CK_OBJECT_HANDLE object, int member); /* to be asked for its attributes */
void ha_object_free(CK_OBJECT_HANDLE object);
void ha_object_show(ha_slot *slot, int member, unsigned epoch, CK_OBJECT_HANDLE member_object); /* no more hidden */
void ha_object_hide(ha_slot *slot, int member, unsigned epoch, CK_OBJECT_HANDLE member_object); /* from C_FindObjects */

/* ---- vendor libraries ---- */
typedef struct ha_library ha_library;
ha_library *ha_library_open(char *path, int private_copy, char *error, size_t error_size);
void *ha_library_list(ha_library *library, unsigned *count, unsigned *major, unsigned *minor, char *error,
                      size_t error_size);
void *ha_library_function(ha_library *library, void *list, unsigned row);
CK_RV ha_library_initialize(void *initialize, CK_FLAGS flags, char *reserved);
CK_RV ha_library_finalize(void *finalize);
int ha_environ_set(char **names, char **values, unsigned count);
void ha_environ_restore(void);
char *ha_getenv(char *name); /* NULL in a process with more rights than its caller */

/* ---- vendor libraries in a process of their own: a number for each, -1: too many ---- */
int ha_remote_new(void);
int ha_remote_start(int remote, char **arguments, char **environment, unsigned *limits_ms, char *error,
                    size_t error_size); /* a limit for each HA_DEADLINE_…, 0: none */
int ha_remote_connect(int remote, char *path, unsigned *limits_ms, char *error, size_t error_size);
int ha_remote_here(int remote, ha_library *library, void *list, unsigned count, unsigned *limits_ms); /* 0: no memory */
void ha_remote_take_turns(int remote);      /* one call at a time */
unsigned ha_remote_left_behind(int remote); /* calls inside a library of this process that nobody waits for any more */
void *ha_remote_function(int remote, unsigned row); /* NULL: its library has none */
void ha_remote_version(int remote, unsigned *major, unsigned *minor);
int ha_remote_alive(int remote);
void ha_remote_kill(int remote); /* calls on it end with CKR_DEVICE_ERROR */
void ha_remote_stop(int remote); /* the same, once its library has been finalised */
void ha_remote_free(int remote);

/* ---- directories in which operators change files ---- */
typedef struct ha_watch ha_watch;
ha_watch *ha_watch_new(void);                         /* NULL: not to be had */
void ha_watch_directory(ha_watch *watch, char *path); /* none there: none watched */
int ha_watch_wait(ha_watch *watch);                   /* 1: something changed, 0: the watch has ended */
int ha_watch_end(ha_watch *watch);                    /* who waits is woken; 0: nobody can be */
void ha_watch_free(ha_watch *watch);

/* ---- secrets ---- */
ha_secret *ha_secret_new(CK_BYTE *bytes, CK_ULONG size);
ha_secret *ha_secret_read(char *path, char *error, size_t error_size);
ha_secret *ha_secret_read_line(char *path, char *error, size_t error_size); /* not a byte more */
CK_BYTE *ha_secret_bytes(ha_secret *secret);
CK_ULONG ha_secret_size(ha_secret *secret);
int ha_secret_equal(ha_secret *secret, CK_BYTE *bytes, CK_ULONG size);
void ha_secret_wipe(ha_secret *secret);

/* ---- life ---- */
int ha_is_version(char *version);  /* 1: that of this library; else one line says that it is another */
void ha_attached(char *version);   /* the core is complete; another version than ours is refused */
void ha_say(char *line);           /* one line on stderr */
unsigned ha_fork_generation(void); /* 0 in the process that loaded us, more in each child of a fork */

/* ---- calls that the core carries out by itself, with the session locked ---- */
CK_RV ha_call_takes(ha_call *call, CK_MECHANISM *mechanism); /* with the object handles inside */
int ha_call_next(ha_call *call);              /* 1: call `function` with `member_session`; 0: `rv` is the answer */
void ha_call_answer(ha_call *call, CK_RV rv); /* what the member said */
void ha_call_free(ha_call *call);             /* what it holds; not the call itself */
typedef struct ha_kept ha_kept;               /* a deep copy of a mechanism */
ha_kept *ha_mechanism_copy(CK_MECHANISM *mechanism); /* NULL: its layout is not known */
CK_MECHANISM *ha_mechanism_kept(ha_kept *kept);
void ha_mechanism_forget(ha_kept *kept); /* wipes it */
