/* The memory of NumPy's large arrays, taken from chunks of an arena.
 *
 * A chunk is a draft of the arena that is mapped at a fixed address. A thread of Python reserves and seals the drafts, and
 * adds chunks ahead of need. This file hands them out and takes them back, in any thread. It never calls Python, nor waits
 * for it: what NumPy calls may hold the GIL or not, be a finalizer, or run under any lock of its caller.
 *
 * Plain C: it includes neither Python's nor NumPy's headers, so one build serves every version of both. The layout of
 * `Handler` is that of NEP 49, version 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

/* The only two functions that would ask for a C library newer than 2.17: the older version of the one, and no `fstat`. */
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pthread_condattr_setclock, pthread_condattr_setclock@GLIBC_2.3.3");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pthread_condattr_setclock, pthread_condattr_setclock@GLIBC_2.17");
#endif

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

typedef struct {
    void *ctx;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *, size_t);
} Allocator;

typedef struct {
    char name[127];
    uint8_t version;
    Allocator allocator;
} Handler;

/* What Python tells once, before the first chunk. */
typedef struct {
    uint64_t area, span;         /* the addresses of all chunks, and nothing else */
    uint64_t base_offset;        /* where in the file the area begins */
    uint64_t device, inode;      /* of the file */
    uint64_t page;
    int fd;
} Setup;

/* IDLE <-> USED are shared mappings. PRIVATE is a copy-on-write mapping of a draft or block that nobody writes. A chunk
 * that is freed while it is MOVING from the one to the other is DROPPED. GONE chunks wait for Python to unmap them. A
 * chunk that is EMPTYING loses its pages, and is IDLE and bare then. A STANDBY chunk is bare, and longer than needed. */
enum { NONE, IDLE, USED, MOVING, DROPPED, PRIVATE, GONE, STANDBY, EMPTYING };

typedef struct {
    uintptr_t start;
    size_t length;
    int state, next;             /* next: of the idle chunks of the same class, the oldest last */
    int is_kept;                 /* a forked child does not get it */
    int is_bare, is_emptied;     /* it has no pages; it had some, which others may remember */
    uint64_t since;              /* when it became idle, in milliseconds */
} Chunk;

enum { CHUNKS = 4096, CLASSES = 16 * 48, GRANULE_BITS = 16, SMALLEST = 128 << 10, ZERO_MOST = 4 << 20 };
enum { LATELY_MS = 1000, QUIET_MS = 20, PER_MIB_BITS = 18 }; /* a number of bytes >> 18 is 4 ms for each MiB */
enum { LARGE = 2 << 20, STANDBY_SMALLEST = 1 << 20, STEP = 64 << 20, FAIR_US = 8000 };

static Chunk chunks[CHUNKS];
static int high, living;         /* chunks[high] and later were never in use; `living` chunks are in use now */
static int idle_heads[2][CLASSES]; /* of chunks with pages, and of bare ones: 1 + the index of a chunk; 0: none */
static uint16_t *index_of;       /* by granule of the area: 1 + the index of the chunk that starts there */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t moving = PTHREAD_MUTEX_INITIALIZER; /* taken before `lock`: one mapping is replaced at a time */
static Setup setup;
static Allocator base;
static pthread_cond_t change;    /* the nursery's thread waits for it */
static volatile int is_on, is_child;
static int has_work, is_heard;   /* there are chunks to give back; the thread wants to know of new demand */
static size_t idle_most, drafts_most, largest, warm_most; /* warm: of idle chunks with pages */
static size_t pages_left;        /* bytes of pages that allocations may make until the nursery's thread looks again */
static uint64_t idle_bytes, bare_bytes, used_bytes, private_bytes, reused, added, missed;

/* What is asked for, by class; times are in milliseconds. */
static struct {
    int missing, wanted;         /* arrays in ordinary memory since the last look, and chunks to add: the most at once */
    int idle;                    /* number of chunks */
    uint64_t used, quiet;        /* when it was last asked for, and until when nothing is added */
} demand[CLASSES];
static int all_wanted, top;      /* top: the largest class of late */
static uint64_t top_used;

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* The caller holds the lock. */
static void wake(void) { has_work = 1, pthread_cond_signal(&change); }

static void begin_waiting(void) {
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&change, &clock);
    pthread_condattr_destroy(&clock);
}

static int is_in_area(const void *place) { return setup.span && (uintptr_t)place - setup.area < setup.span; }

/* Sixteen lengths for each power of two; `*length` is rounded up to one of them. */
static int class_of(size_t *length) {
    int bits = 63 - __builtin_clzl(*length);
    size_t unit = (size_t)1 << (bits - 4);
    if (unit < setup.page) unit = setup.page;
    *length = (*length + unit - 1) / unit * unit;
    bits = 63 - __builtin_clzl(*length);
    return bits * 16 + (int)((*length >> (bits - 4)) & 15) - 16 * 16;
}

static size_t length_of(int class) { return (size_t)(16 + class % 16) << (class / 16 + 12); }

/* How long a class counts as in use after an array was asked for: a task that fills a large one takes its time. */
static uint64_t lately(int class) { return LATELY_MS + (length_of(class) >> PER_MIB_BITS); }

static int is_our_file(void) {
    struct statx now;
    return !syscall(SYS_statx, setup.fd, "", AT_EMPTY_PATH, STATX_INO, &now) && now.stx_ino == setup.inode &&
           makedev(now.stx_dev_major, now.stx_dev_minor) == setup.device;
}

static Chunk *starting_at(const void *place) {
    size_t granule = ((uintptr_t)place - setup.area) >> GRANULE_BITS;
    int index = index_of[granule];
    return index && chunks[index - 1].start == (uintptr_t)place ? &chunks[index - 1] : NULL;
}

static Chunk *around(uintptr_t address, size_t length) {
    for (int i = 0; i < high; i++) {
        Chunk *c = &chunks[i];
        if (c->state != NONE && address - c->start < c->length)
            return length <= c->length - (address - c->start) ? c : NULL;
    }
    return NULL;
}

/* -- idle chunks; the caller holds the lock */

static int class_of_chunk(const Chunk *c) {
    size_t length = c->length;
    return class_of(&length);
}

static uint64_t *bytes_like(const Chunk *c) { return c->is_bare ? &bare_bytes : &idle_bytes; }

static void put_idle(Chunk *c) {
    int class = class_of_chunk(c), *head = &idle_heads[c->is_bare][class];
    c->state = IDLE, c->since = now_ms();
    c->next = *head, *head = 1 + (int)(c - chunks);
    *bytes_like(c) += c->length, demand[class].idle++;
}

static void take_idle(Chunk *c) {
    int class = class_of_chunk(c), *at = &idle_heads[c->is_bare][class], index = 1 + (int)(c - chunks);
    while (*at != index) at = &chunks[*at - 1].next;
    *at = c->next;
    *bytes_like(c) -= c->length, demand[class].idle--;
}

/* An idle chunk of a class, or of the next; one with pages if there is one. Returns 1 + its index, or 0. */
static int idle_of(int class) {
    for (int is_bare = 0; is_bare < 2; is_bare++)
        for (int each = class; each < class + 2; each++)
            if (idle_heads[is_bare][each]) return idle_heads[is_bare][each];
    return 0;
}

/* One chunk of any length that is in use may be idle. */
static size_t idle_allowed(uint64_t now) {
    size_t one = now - top_used <= lately(top) ? length_of(top) : 0;
    return idle_most && idle_most < one ? one : idle_most;
}

static int is_too_much(uint64_t now) {
    uint64_t all = idle_bytes + bare_bytes;
    return all && (all > idle_allowed(now) || used_bytes + all > drafts_most);
}

/* -- demand; the caller holds the lock */

static void want(int class, int count) {
    if (demand[class].wanted >= count) return;
    all_wanted += count - demand[class].wanted;
    demand[class].wanted = count;
    if (is_heard) pthread_cond_signal(&change);
}

static void note_demand(int class, int is_missed) {
    uint64_t now = now_ms();
    demand[class].used = now;
    if (class >= top || now - top_used > lately(top)) top = class, top_used = now;
    if (now < demand[class].quiet || !idle_most || used_bytes + idle_bytes + bare_bytes + length_of(class) > drafts_most) return;
    int is_last = !idle_of(class);
    if (is_missed) want(class, ++demand[class].missing);
    else if (is_last && now >= demand[class].quiet + LATELY_MS) want(class, 1); /* ahead of need, unless that was in vain */
}

/* -- the chunk for the next array of any length, in a block of the client */

static int standby;              /* 1 + the index of the chunk; 0: none */
static volatile int makes_large;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int reserve_pages(uintptr_t at, size_t length) {
    int tries = 0, outcome;
    do outcome = fallocate(setup.fd, 0, (off_t)(setup.base_offset + (at - setup.area)), (off_t)length);
    while (outcome && errno == EINTR && ++tries < 100);
    return !outcome;
}

/* Make the pages of a shared mapping exist, large ones as long as the kernel makes them quickly. */
static int make_pages(uintptr_t start, size_t length) {
    uintptr_t end = start + length;
    for (uintptr_t at = start, next; at < end; at = next) {
        next = (at / STEP + 1) * STEP;
        if (next > end) next = end;
        uintptr_t first = (at + LARGE - 1) / LARGE * LARGE, last = next / LARGE * LARGE;
        if (makes_large && first < last) {
            uint64_t began = now_us();
            /* The kernel needs one small page of each to begin with. */
            for (uintptr_t page = first; page < last; page += LARGE)
                if (!reserve_pages(page, setup.page)) return 0;
            int is_made = !madvise((void *)first, last - first, MADV_COLLAPSE);
            if (!is_made || now_us() - began > (last - first) / LARGE * FAIR_US) makes_large = 0;
        }
        if (!reserve_pages(at, next - at)) return 0;
        madvise((void *)at, next - at, MADV_POPULATE_WRITE);
    }
    return 1;
}

/* Make the pages of a chunk that was bare, and return its address; NULL if that is not possible. */
static void *with_pages(Chunk *c) {
    size_t size = c->length;
    int is_made = make_pages(c->start, size);
    pthread_mutex_lock(&lock);
    if (is_made) c->is_bare = c->is_emptied = 0;
    else c->is_emptied = 1, pages_left = 0, reused--, missed++; /* what fails may take pages that nobody has touched */
    if (!is_made && c->state == MOVING) { /* a fork makes it private */
        c->state = DROPPED;
    } else if (!is_made) {
        *(c->state == PRIVATE ? &private_bytes : &used_bytes) -= size;
        c->state = GONE;
    }
    wake();
    pthread_mutex_unlock(&lock);
    return is_made ? (void *)c->start : NULL;
}

static void *from_standby(size_t size) {
    int class = class_of(&size);
    pthread_mutex_lock(&lock);
    Chunk *c = standby ? &chunks[standby - 1] : NULL;
    if (!c || !is_on || class >= CLASSES || c->length <= size || !is_our_file()) c = NULL;
    if (c) standby = 0, c->state = USED, c->length = size, used_bytes += size, reused++, missed--;
    pthread_mutex_unlock(&lock);
    return c ? with_pages(c) : NULL;
}

/* -- what NumPy calls */

static void *chunk_for(size_t size, int is_demand) {
    if (!is_on || size < SMALLEST || size > largest) return NULL;
    int class = class_of(&size), is_bare = 0;
    if (class + 1 >= CLASSES) return NULL;
    pthread_mutex_lock(&lock);
    int index = idle_of(class);
    Chunk *c = index ? &chunks[index - 1] : NULL;
    /* Zeros may never be touched, so no pages are made for them. */
    if (c && c->is_bare && (!is_demand || c->length > pages_left || !is_our_file())) c = NULL;
    if (c) {
        take_idle(c);
        is_bare = c->is_bare;
        if (is_bare) pages_left -= c->length;
        c->state = USED, used_bytes += c->length, reused++;
        demand[class_of_chunk(c)].used = now_ms();
    } else {
        missed++;
    }
    if (is_demand) note_demand(class, !index);
    pthread_mutex_unlock(&lock);
    return is_bare ? with_pages(c) : c ? (void *)c->start : NULL;
}

static void *born_malloc(void *ctx, size_t size) {
    int is_block = ctx != NULL && size >= STANDBY_SMALLEST;
    void *place = chunk_for(size, !is_block || !standby);
    if (!place && is_block) place = from_standby(size);
    return place ? place : base.malloc(base.ctx, size);
}

static void *born_calloc(void *ctx, size_t count, size_t size) {
    (void)ctx;
    size_t whole;
    /* The kernel's own zeroed pages may never be touched, so no chunk is added for zeros; and large ones are quicker. */
    if (!__builtin_mul_overflow(count, size, &whole) && whole <= ZERO_MOST) {
        void *place = chunk_for(whole, 0);
        if (place) return memset(place, 0, whole);
    }
    return base.calloc(base.ctx, count, size);
}

static void born_free(void *ctx, void *place, size_t size) {
    (void)ctx;
    /* NumPy may pass another size than that of the allocation, so it is no more than a hint. */
    if (!is_in_area(place)) {
        base.free(base.ctx, place, size);
        if (!is_on || size < SMALLEST || size > largest) return;
        int class = class_of(&size);
        pthread_mutex_lock(&lock);
        if (class < CLASSES && demand[class].missing) demand[class].missing--;
        pthread_mutex_unlock(&lock);
        return;
    }
    pthread_mutex_lock(&lock);
    Chunk *c = starting_at(place);
    if (c && is_child) {
        madvise((void *)c->start, c->length, MADV_DONTNEED);
    } else if (c && c->state == USED) {
        int is_emptied = 1;
        if (idle_bytes + c->length > warm_most) {
            c->state = EMPTYING;
            pthread_mutex_unlock(&lock);
            is_emptied = !madvise((void *)c->start, c->length, MADV_REMOVE);
            pthread_mutex_lock(&lock);
            c->is_bare = c->is_emptied = 1;
            if (is_emptied) pages_left += c->length;
        }
        used_bytes -= c->length;
        if (is_emptied) put_idle(c);
        else c->state = GONE;
        if (!is_emptied || is_too_much(c->since)) wake();
    } else if (c && c->state == MOVING) {
        c->state = DROPPED;
    } else if (c && c->state == PRIVATE) {
        c->state = GONE, private_bytes -= c->length;
        wake();
    }
    pthread_mutex_unlock(&lock);
}

static void *born_realloc(void *ctx, void *place, size_t size) {
    if (!is_in_area(place)) return place ? base.realloc(base.ctx, place, size) : born_malloc(ctx, size);
    pthread_mutex_lock(&lock);
    Chunk *c = starting_at(place);
    size_t length = c ? c->length : 0;
    pthread_mutex_unlock(&lock);
    if (size <= length && size >= length / 2) return place;
    void *to = born_malloc(ctx, size);
    if (!to) return NULL;
    memcpy(to, place, size < length ? size : length);
    born_free(ctx, place, length);
    return to;
}

Handler born_handler = {"dask_shm", 1, {NULL, born_malloc, born_calloc, born_realloc, born_free}};
Handler born_block_handler = {"dask_shm", 1, {&standby, born_malloc, born_calloc, born_realloc, born_free}};

/* -- replacing a mapping; the caller holds `moving` */

static int make_private(const Chunk *c) {
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    off_t offset = (off_t)(setup.base_offset + (c->start - setup.area));
    return mmap((void *)c->start, c->length, PROT_READ | PROT_WRITE, flags, setup.fd, offset) != MAP_FAILED;
}

/* The caller holds both locks. */
static void has_moved(Chunk *c, int is_private) {
    int is_dropped = c->state == DROPPED;
    if (is_private) {
        used_bytes -= c->length;
        if (!is_dropped) private_bytes += c->length;
        c->is_kept = 0;
        c->state = is_dropped ? GONE : PRIVATE;
    } else if (is_dropped) {
        used_bytes -= c->length;
        put_idle(c);
    } else {
        c->state = USED;
    }
}

/* -- forks from C; Python's own are prepared in Python, which also seals */

static void before_fork(void) {
    pthread_mutex_lock(&moving);
    pthread_mutex_lock(&lock);
    int can_move = is_our_file();
    for (int i = 0; i < high && used_bytes && !is_child; i++) {
        Chunk *c = &chunks[i];
        if (c->state != USED) continue;
        has_moved(c, can_move && make_private(c));
        /* Better that the child has no array than that it writes into its parent's. */
        if (c->state == USED) c->is_kept = !madvise((void *)c->start, c->length, MADV_DONTFORK);
    }
}

static void after_fork(void) {
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&moving);
}

static void in_child(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&moving, NULL);
    begin_waiting();
    is_on = 0;
    /* Nothing else may ever lie where an array of the parent's lies. */
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    for (int i = 0; i < high && !is_child; i++) {
        Chunk *c = &chunks[i];
        if (c->is_kept && mmap((void *)c->start, c->length, PROT_NONE, flags, -1, 0) != (void *)c->start) c->start = 0;
    }
    if (living) is_child = 1; /* the chunks are its parent's; their addresses stay as they are */
    else setup.span = 0;
}

/* -- what Python calls */

/* Begin with an empty area. Returns 0 if that is not possible. */
int born_begin(const Setup *given, uint16_t *granules, const Handler *numpys) {
    static int is_prepared;
    if (setup.span || is_child || numpys->version != 1) return 0;
    if (!is_prepared) {
        begin_waiting();
        if (pthread_atfork(before_fork, after_fork, in_child)) return 0;
        is_prepared = 1;
    }
    pthread_mutex_lock(&lock);
    setup = *given, index_of = granules, base = numpys->allocator, high = 0;
    memset(demand, 0, sizeof demand);
    idle_most = drafts_most = largest = warm_most = pages_left = all_wanted = top = has_work = is_heard = 0;
    reused = added = missed = top_used = 0, standby = 0;
    pthread_mutex_unlock(&lock);
    is_on = 1;
    return 1;
}

void born_limit(size_t drafts, size_t idle, size_t one, size_t warm, size_t pages) {
    pthread_mutex_lock(&lock);
    drafts_most = drafts, idle_most = is_on ? idle : 0, largest = one, warm_most = warm, pages_left = pages;
    pthread_mutex_unlock(&lock);
}

void born_stop(void) {
    pthread_mutex_lock(&lock);
    is_on = 0, idle_most = 0;
    wake();
    pthread_mutex_unlock(&lock);
}

/* Let the nursery's thread take a turn now. */
void born_wake(void) {
    pthread_mutex_lock(&lock);
    wake();
    pthread_mutex_unlock(&lock);
}

/* Wait until there is a chunk to give back or, if that is to be heard, to add; or for some time. */
void born_wait(uint64_t milliseconds, int hears_demand) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += milliseconds / 1000, until.tv_nsec += milliseconds % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&lock);
    is_heard = hears_demand;
    while (!has_work && !(is_heard && all_wanted) && !pthread_cond_timedwait(&change, &lock, &until)) {}
    is_heard = has_work = 0;
    pthread_mutex_unlock(&lock);
}

/* The length of a chunk to be added now, or 0. */
size_t born_wanted(void) {
    size_t length = 0;
    pthread_mutex_lock(&lock);
    uint64_t now = now_ms();
    for (int class = 0; class < CLASSES && all_wanted && !length; class++) {
        if (!demand[class].wanted) continue;
        size_t one = length_of(class);
        int fits = is_on && used_bytes + idle_bytes + bare_bytes + one <= drafts_most && now - demand[class].used <= lately(class) &&
                   (demand[class].idle + 1) * one <= idle_allowed(now);
        int taken = fits ? 1 : demand[class].wanted;
        all_wanted -= taken, demand[class].wanted -= taken;
        if (!fits || demand[class].missing > demand[class].wanted) demand[class].missing = demand[class].wanted;
        if (fits) length = one;
    }
    pthread_mutex_unlock(&lock);
    return length;
}

/* Forget the area. Returns 0 if chunks are left. */
int born_end(void) {
    pthread_mutex_lock(&lock);
    int is_empty = !living;
    if (is_empty) setup.span = 0;
    pthread_mutex_unlock(&lock);
    return is_empty;
}

/* Add a mapped chunk without pages, which is idle or the one on standby. Returns 0 if there are too many. */
int born_add(uintptr_t start, size_t length, int is_standby, int is_large) {
    int i = 0;
    pthread_mutex_lock(&lock);
    if (living == high) i = high;
    while (i < high && chunks[i].state != NONE) i++;
    int fits = i < CHUNKS && is_on && !(is_standby && standby);
    if (fits) {
        if (i == high) high++;
        chunks[i] = (Chunk){.start = start, .length = length, .state = IDLE, .is_bare = 1};
        index_of[(start - setup.area) >> GRANULE_BITS] = (uint16_t)(i + 1);
        living++, added++;
        makes_large = is_large;
        if (is_standby) chunks[i].state = STANDBY, standby = i + 1;
        else put_idle(&chunks[i]);
    }
    pthread_mutex_unlock(&lock);
    return fits;
}

/* The length of the chunk that starts here; 0 if there is none. */
size_t born_length(uintptr_t start) {
    pthread_mutex_lock(&lock);
    Chunk *c = is_in_area((void *)start) ? starting_at((void *)start) : NULL;
    size_t length = c ? c->length : 0;
    pthread_mutex_unlock(&lock);
    return length;
}

/* Whether a chunk is on standby; if `ends`, it is gone now. */
int born_stands_by(int ends) {
    pthread_mutex_lock(&lock);
    int is_there = standby != 0;
    if (is_there && ends) chunks[standby - 1].state = GONE, standby = 0, wake();
    pthread_mutex_unlock(&lock);
    return is_there;
}

/* Make the chunk around some bytes private. Returns 1 if it is now, 2 if it was before; 0 if there is none, it cannot
 * be, or the bytes are less than half of it. */
int born_make_private(uintptr_t address, size_t length, uint64_t *start, uint64_t *whole) {
    int outcome = 0;
    if (!setup.span || address - setup.area >= setup.span) return 0;
    pthread_mutex_lock(&moving);
    pthread_mutex_lock(&lock);
    Chunk *c = around(address, length);
    if (c) *start = c->start, *whole = c->length;
    if (c && c->state == PRIVATE) {
        outcome = 2;
    } else if (c && c->state == USED && length >= c->length / 2 && !is_child && is_our_file()) {
        c->state = MOVING;
        pthread_mutex_unlock(&lock);
        int is_private = make_private(c);
        pthread_mutex_lock(&lock);
        has_moved(c, is_private);
        outcome = c->state == PRIVATE;
    }
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&moving);
    return outcome;
}

/* Take out a chunk that is gone, or an idle one: any if `all`, else one that is older than `most_ms`, or the oldest while
 * they are too much. Of a class that is in use, one chunk is kept at any age. Returns its address, or 0; `is_emptied` tells
 * whether others may remember pages that it lacks. */
uintptr_t born_take_gone(uint64_t most_ms, int all, int *is_emptied) {
    Chunk *found = NULL;
    uintptr_t start = 0;
    pthread_mutex_lock(&lock);
    uint64_t now = now_ms();
    int too_much = is_too_much(now);
    for (int i = 0; i < high && !is_child; i++) {
        Chunk *c = &chunks[i];
        if (c->state == GONE) {
            found = c;
            break;
        }
        if (c->state != IDLE || (found && found->since <= c->since)) continue;
        int is_used = now - demand[class_of_chunk(c)].used <= most_ms + (c->length >> PER_MIB_BITS);
        int is_old = now - c->since > most_ms && (c->next || !is_used);
        if (all || too_much || is_old) found = c;
    }
    /* What was added in vain is not added again at once. */
    if (found && found->state == IDLE && too_much && !all) demand[class_of_chunk(found)].quiet = now + QUIET_MS;
    if (found) {
        if (found->state == IDLE) take_idle(found);
        start = found->start, *is_emptied = found->is_emptied;
        found->state = NONE, found->is_kept = 0, living--;
        index_of[(start - setup.area) >> GRANULE_BITS] = 0;
    }
    pthread_mutex_unlock(&lock);
    return start;
}

/* The chunk number `n` if it is in use and shared. */
int born_is_used(int n, uint64_t *start, uint64_t *whole) {
    pthread_mutex_lock(&lock);
    int is_used = n < high && chunks[n].state == USED;
    if (is_used) *start = chunks[n].start, *whole = chunks[n].length;
    int is_over = n >= high;
    pthread_mutex_unlock(&lock);
    return is_over ? -1 : is_used;
}

void born_figures(uint64_t *to) {
    pthread_mutex_lock(&lock);
    uint64_t now[] = {used_bytes, idle_bytes, bare_bytes, private_bytes, reused, added, missed, (uint64_t)living};
    memcpy(to, now, sizeof now);
    pthread_mutex_unlock(&lock);
}
