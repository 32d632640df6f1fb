/* The memory of NumPy's large arrays, taken from chunks of an arena.
 *
 * A chunk is a draft of the arena that is mapped at a fixed address. Python reserves and seals the drafts; this file
 * hands chunks out and takes them back, in any thread, and never calls Python except through `lease`.
 *
 * Plain C: it includes neither Python's nor NumPy's headers, so one build serves every version of both. The layout of
 * `Handler` is that of NEP 49, version 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

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
    int (*lease)(size_t);        /* Python: add a chunk of this length, for the calling thread; NULL: none */
    int (*has_gil)(void);
    void *(*has_error)(void);
    int (*raise)(unsigned long, void *);
    int fd;
} Setup;

/* IDLE <-> USED are shared mappings. PRIVATE is a copy-on-write mapping of a draft or block that nobody writes. A chunk
 * that is freed while it is MOVING from the one to the other is DROPPED. GONE chunks wait for Python to unmap them. */
enum { NONE, IDLE, USED, MOVING, DROPPED, PRIVATE, GONE };

typedef struct {
    uintptr_t start;
    size_t length;
    int state, next;             /* next: of the idle chunks of the same class */
    uint64_t since;              /* when it became idle, in milliseconds */
} Chunk;

enum { CHUNKS = 4096, CLASSES = 16 * 48, GRANULE_BITS = 16, SMALLEST = 128 << 10, ZERO_MOST = 4 << 20 };

static Chunk chunks[CHUNKS];
static int high, living;         /* chunks[high] and later were never in use; `living` chunks are in use now */
static int idle_heads[CLASSES];  /* 1 + the index of a chunk; 0: none */
static uint16_t *index_of;       /* by granule of the area: 1 + the index of the chunk that starts there */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t moving = PTHREAD_MUTEX_INITIALIZER; /* taken before `lock`: one mapping is replaced at a time */
static Setup setup;
static Allocator base;
static volatile int is_on, is_child;
static int wake_fd = -1;
static size_t idle_most, drafts_most, largest;
static uint64_t idle_bytes, used_bytes, private_bytes, reused, leased, refused;
static volatile uint64_t paused_until; /* milliseconds */
static __thread int is_leasing;
static __thread void *handed_over;
static __thread unsigned long interrupted_thread;
static __thread void *interruption;

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void wake(void) {
    uint64_t one = 1;
    int before = errno;
    if (wake_fd >= 0 && write(wake_fd, &one, sizeof one) < 0) { /* it is full, so the thread wakes up anyway */ }
    errno = before;
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

static void put_idle(Chunk *c) {
    size_t length = c->length;
    int *head = &idle_heads[class_of(&length)];
    c->state = IDLE, c->since = now_ms();
    c->next = *head, *head = 1 + (int)(c - chunks);
    idle_bytes += c->length;
}

static void take_idle(Chunk *c) {
    size_t length = c->length;
    int *at = &idle_heads[class_of(&length)], index = 1 + (int)(c - chunks);
    while (*at != index) at = &chunks[*at - 1].next;
    *at = c->next;
    idle_bytes -= c->length;
}

static void *reuse(size_t size) {
    int class = class_of(&size), index = 0;
    pthread_mutex_lock(&lock);
    for (int n = class; n <= class + 1 && n < CLASSES && !index; n++) index = idle_heads[n];
    if (index) {
        Chunk *c = &chunks[index - 1];
        take_idle(c);
        c->state = USED, used_bytes += c->length, reused++;
    }
    pthread_mutex_unlock(&lock);
    return index ? (void *)chunks[index - 1].start : NULL;
}

/* -- what NumPy calls */

static void *lease_chunk(size_t size) {
    size_t length = size;
    class_of(&length);
    /* Python must not run here without the GIL, on top of an error that is being handled, or inside itself. */
    if (is_leasing || !setup.lease || used_bytes + idle_bytes + length > drafts_most || now_ms() < paused_until ||
        !setup.has_gil() || setup.has_error())
        return NULL;
    int before = errno;
    is_leasing = 1, handed_over = NULL;
    setup.lease(length);
    is_leasing = 0;
    errno = before;
    if (interruption) setup.raise(interrupted_thread, interruption);
    interruption = NULL;
    void *place = handed_over;
    handed_over = NULL;
    return place;
}

static void *chunk_for(size_t size) {
    if (!is_on || size < SMALLEST || size > largest) return NULL;
    void *place = reuse(size);
    if (!place) place = lease_chunk(size);
    if (!place) __atomic_fetch_add(&refused, 1, __ATOMIC_RELAXED);
    return place;
}

static void *born_malloc(void *ctx, size_t size) {
    (void)ctx;
    void *place = chunk_for(size);
    return place ? place : base.malloc(base.ctx, size);
}

static void *born_calloc(void *ctx, size_t count, size_t size) {
    (void)ctx;
    size_t whole;
    /* Beyond some size the kernel's own zeroed pages are quicker, and may never be touched. */
    if (!__builtin_mul_overflow(count, size, &whole) && whole <= ZERO_MOST) {
        void *place = chunk_for(whole);
        if (place) return memset(place, 0, whole);
    }
    return base.calloc(base.ctx, count, size);
}

static void born_free(void *ctx, void *place, size_t size) {
    (void)ctx;
    if (!is_in_area(place)) {
        base.free(base.ctx, place, size);
        return;
    }
    /* `size` is not used: NumPy may pass another one than that of the allocation. */
    int must_wake = 0;
    pthread_mutex_lock(&lock);
    Chunk *c = starting_at(place);
    if (c && is_child) {
        madvise((void *)c->start, c->length, MADV_DONTNEED);
    } else if (c && c->state == USED) {
        used_bytes -= c->length;
        put_idle(c);
        must_wake = idle_bytes > idle_most;
    } else if (c && c->state == MOVING) {
        c->state = DROPPED;
    } else if (c && c->state == PRIVATE) {
        c->state = GONE, private_bytes -= c->length, must_wake = 1;
    }
    pthread_mutex_unlock(&lock);
    if (must_wake) wake();
}

static void *born_realloc(void *ctx, void *place, size_t size) {
    if (!is_in_area(place)) return place ? base.realloc(base.ctx, place, size) : born_malloc(ctx, size);
    pthread_mutex_lock(&lock);
    Chunk *c = starting_at(place);
    size_t length = c ? c->length : 0;
    pthread_mutex_unlock(&lock);
    if (size <= length && size >= length / 2) return place;
    /* No lease: NumPy has counted the array's references, and Python could let another thread add one. */
    void *to = is_on && size >= SMALLEST && size <= largest ? reuse(size) : NULL;
    if (!to) to = base.malloc(base.ctx, size);
    if (!to) return NULL;
    memcpy(to, place, size < length ? size : length);
    born_free(ctx, place, length);
    return to;
}

Handler born_handler = {"dask_shm", 1, {NULL, born_malloc, born_calloc, born_realloc, born_free}};

/* -- replacing a mapping; the caller holds `moving` */

static int is_our_file(void) {
    struct stat now;
    return fstat(setup.fd, &now) == 0 && (uint64_t)now.st_dev == setup.device && (uint64_t)now.st_ino == setup.inode;
}

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
    if (used_bytes && !is_child && is_our_file())
        for (int i = 0; i < high; i++)
            if (chunks[i].state == USED) has_moved(&chunks[i], make_private(&chunks[i]));
}

static void after_fork(void) {
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&moving);
}

static void in_child(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&moving, NULL);
    is_on = 0, wake_fd = -1, is_leasing = 0;
    if (living) is_child = 1; /* the chunks are its parent's; their addresses stay as they are */
    else setup.span = 0;
}

/* -- what Python calls */

/* Begin with an empty area. Returns a descriptor that becomes readable when there is work for `born_take_gone`, or -1. */
int born_begin(const Setup *given, uint16_t *granules, const Handler *numpys) {
    static int is_prepared;
    if (setup.span || is_child || numpys->version != 1) return -1;
    if (!is_prepared && pthread_atfork(before_fork, after_fork, in_child)) return -1;
    is_prepared = 1;
    if (wake_fd < 0) wake_fd = eventfd(0, EFD_CLOEXEC);
    if (wake_fd < 0) return -1;
    pthread_mutex_lock(&lock);
    setup = *given, index_of = granules, base = numpys->allocator, paused_until = 0, high = 0;
    reused = leased = refused = 0;
    pthread_mutex_unlock(&lock);
    is_on = 1;
    return wake_fd;
}

void born_limit(size_t drafts, size_t idle, size_t one) {
    drafts_most = drafts, idle_most = idle, largest = one;
    if (idle_bytes > idle_most) wake();
}

void born_stop(void) { is_on = 0, idle_most = 0, wake(); }

void born_pause(uint64_t milliseconds) { paused_until = now_ms() + milliseconds; }

/* Raise an error of this class in the calling thread, which leases, as soon as it runs Python code again. */
void born_raise(unsigned long thread, void *kind) { interrupted_thread = thread, interruption = kind; }

void born_wake(void) { wake(); }

/* Forget the area and close the descriptor. Returns 0 if chunks are left. */
int born_end(void) {
    pthread_mutex_lock(&lock);
    int is_empty = !living;
    if (is_empty) {
        setup.span = 0, setup.lease = NULL;
        if (wake_fd >= 0) close(wake_fd);
        wake_fd = -1;
    }
    pthread_mutex_unlock(&lock);
    return is_empty;
}

/* Add a mapped chunk, which the calling thread gets if it has asked for one. Returns 0 if there are too many. */
int born_add(uintptr_t start, size_t length) {
    int i = 0;
    pthread_mutex_lock(&lock);
    if (living == high) i = high;
    while (i < high && chunks[i].state != NONE) i++;
    int fits = i < CHUNKS && is_on;
    if (fits) {
        if (i == high) high++;
        chunks[i] = (Chunk){start, length, USED, 0, 0};
        index_of[(start - setup.area) >> GRANULE_BITS] = (uint16_t)(i + 1);
        living++, leased++, used_bytes += length;
        if (is_leasing) handed_over = (void *)start;
        else used_bytes -= length, put_idle(&chunks[i]);
    }
    pthread_mutex_unlock(&lock);
    return fits;
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

/* Take out a chunk that is gone, or one of the idle ones while they are too many or older than `most_ms`. */
int born_take_gone(uint64_t most_ms, uint64_t *start, uint64_t *whole) {
    Chunk *found = NULL;
    pthread_mutex_lock(&lock);
    uint64_t now = now_ms();
    for (int i = 0; i < high && !is_child; i++) {
        Chunk *c = &chunks[i];
        if (c->state == GONE) {
            found = c;
            break;
        }
        int is_over = c->state == IDLE && (idle_bytes > idle_most || now - c->since > most_ms);
        if (is_over && (!found || c->since < found->since)) found = c;
    }
    if (found) {
        if (found->state == IDLE) take_idle(found);
        *start = found->start, *whole = found->length;
        found->state = NONE, living--;
        index_of[(found->start - setup.area) >> GRANULE_BITS] = 0;
    }
    pthread_mutex_unlock(&lock);
    return found != NULL;
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
    uint64_t now[] = {used_bytes, idle_bytes, private_bytes, reused, leased, refused, (uint64_t)living};
    memcpy(to, now, sizeof now);
    pthread_mutex_unlock(&lock);
}
