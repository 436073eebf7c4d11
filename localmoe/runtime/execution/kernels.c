/* Products with the low-rank factors of several experts where they lie: every factor is read once and copied nowhere.

   Activations and factors are bf16, what is between them fp32, sums fp32 and rounded once (to nearest, ties to even);
   for a dense product (lay, merge) so are the weighted Bt.
   Two levels: 2 = AMX tiles, 1 = AVX-512 BF16; on a processor with neither, `localmoe_level` is 0 and nothing else may
   be called; where this cannot be compiled, the file is empty. The threads are those of the OpenMP that torch has
   loaded: this file is linked to none of its own, since two would wait for each other's threads. Buffers come from the
   caller. */
#include <stdint.h>
#include <string.h>

#define WIDE 16  /* floats of a vector; rows, pairs and columns of a tile */
#define SIDE (2 * WIDE) /* bf16 numbers of a vector; rows and columns of a block of two tiles */
#define DEEP 64  /* rows of Bt that are multiplied at a time */
#define SUMMED 2048 /* numbers that are summed at a time: their sums stay in the nearest cache */

typedef uint32_t words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE)));

#define WRITTEN __asm__ volatile("" ::: "memory") /* GCC does not know that loading a tile reads memory */
#define SOON(place) __builtin_prefetch(place, 0, 2) /* into the second cache: the first is full of what is in use */
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AVX512 "avx512f,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512"
#define BY_AVX512 __attribute__((target(AVX512)))
#define BY_AMX __attribute__((target(AVX512 ",amx-tile,amx-bf16")))

/* ---- numbers ---- */

INLINE float one(uint16_t value) {
    uint32_t word = (uint32_t)value << 16;
    float result;
    memcpy(&result, &word, sizeof result);
    return result;
}

INLINE uint16_t rounded(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    uint32_t near = (word + 0x7fff + (word >> 16 & 1)) >> 16, nan = word >> 16 | 0x40;
    return (uint16_t)((word & 0x7fffffff) > 0x7f800000 ? nan : near);
}

INLINE words read_words(const uint16_t *from) {
    halves read;
    memcpy(&read, from, sizeof read);
    return __builtin_convertvector(read, words);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE __mmask32 low_bits(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1; }

/* 16 rows of 16 words, transposed. */
BY_AVX512 INLINE void transpose(__m512i *row) {
    __m512i made[WIDE];
    for (int u = 0; u < WIDE; u += 2) {
        made[u] = _mm512_unpacklo_epi32(row[u], row[u + 1]);
        made[u + 1] = _mm512_unpackhi_epi32(row[u], row[u + 1]);
    }
    for (int u = 0; u < WIDE; u += 4) {
        row[u] = _mm512_unpacklo_epi64(made[u], made[u + 2]);
        row[u + 1] = _mm512_unpackhi_epi64(made[u], made[u + 2]);
        row[u + 2] = _mm512_unpacklo_epi64(made[u + 1], made[u + 3]);
        row[u + 3] = _mm512_unpackhi_epi64(made[u + 1], made[u + 3]);
    }
    for (int u = 0; u < 4; u++) {
        made[u] = _mm512_shuffle_i32x4(row[u], row[u + 4], 0x88);
        made[u + 4] = _mm512_shuffle_i32x4(row[u], row[u + 4], 0xdd);
        made[u + 8] = _mm512_shuffle_i32x4(row[u + 8], row[u + 12], 0x88);
        made[u + 12] = _mm512_shuffle_i32x4(row[u + 8], row[u + 12], 0xdd);
    }
    for (int u = 0; u < 8; u++) {
        row[u] = _mm512_shuffle_i32x4(made[u], made[u + 8], 0x88);
        row[u + 8] = _mm512_shuffle_i32x4(made[u], made[u + 8], 0xdd);
    }
}

/* ---- narrow: out[t, j] = w[t, k] · Σ_i x[t, i] A_k[j, i], for some rows j of one A_k ---- */

/* x as bf16; d is a multiple of 32. `next`: what will be read after these rows. */
BY_AVX512 static void narrow_pairs(const uint16_t *x, int64_t tokens, int64_t d, const uint16_t *A, int64_t rows,
                                   const uint16_t *next, const float *weights, int64_t weight_step, float *out,
                                   int64_t out_step) {
    for (int64_t j = 0; j < rows; j += 4) {
        const uint16_t *soon = j + 4 < rows ? A + (j + 4) * d : next;
        for (int64_t t = 0; t < tokens; t += 4) {
            int64_t high = least(rows - j, 4), broad = least(tokens - t, 4);
            __m512 part[4][4];
            for (int u = 0; u < 4; u++)
                for (int v = 0; v < 4; v++) part[u][v] = _mm512_setzero_ps();
            const uint16_t *a[4], *b[4];
            for (int u = 0; u < 4; u++) a[u] = A + (j + (u < high ? u : 0)) * d;
            for (int v = 0; v < 4; v++) b[v] = x + (t + (v < broad ? v : 0)) * d;
            for (int64_t i = 0; i < d; i += 2 * WIDE) {
                __m512bh left[4], right[4];
                if (t == 0)
                    for (int u = 0; u < 4; u++) SOON(soon + u * d + i);
                for (int u = 0; u < 4; u++) left[u] = (__m512bh)_mm512_loadu_si512(a[u] + i);
                for (int v = 0; v < 4; v++) right[v] = (__m512bh)_mm512_loadu_si512(b[v] + i);
                for (int u = 0; u < 4; u++)
                    for (int v = 0; v < 4; v++) part[u][v] = _mm512_dpbf16_ps(part[u][v], left[u], right[v]);
            }
            for (int64_t u = 0; u < high; u++)
                for (int64_t v = 0; v < broad; v++)
                    out[(t + v) * out_step + j + u] =
                        _mm512_reduce_add_ps(part[u][v]) * weights[(t + v) * weight_step];
        }
    }
}

/* x in tiles [tokens / 16, d / 32, 16 pairs, 16 tokens, 2]; d is a multiple of 32. `tail`: room for 16 rows of A. */
BY_AMX static void narrow_tiles(const uint16_t *x, int64_t tokens, int64_t d, const uint16_t *A, int64_t rows,
                                const uint16_t *next, const float *weights, int64_t weight_step, float *out,
                                int64_t out_step, uint16_t *tail) {
    float made[2][WIDE][WIDE];
    WRITTEN;
    for (int64_t j = 0; j < rows; j += WIDE) {
        int64_t high = least(rows - j, WIDE);
        const uint16_t *a = A + j * d, *soon = j + WIDE < rows ? a + WIDE * d : next;
        if (high < WIDE) {
            memset(tail, 0, sizeof(uint16_t) * WIDE * d);
            a = memcpy(tail, a, sizeof(uint16_t) * high * d);
            WRITTEN;
        }
        for (int64_t t = 0; t < tokens; t += 2 * WIDE) {
            int two = t + WIDE < tokens;
            const uint16_t *b = x + t * d, *c = b + WIDE * d;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t i = 0; i < d; i += 2 * WIDE) {
                if (t == 0)
                    for (int u = 0; u < WIDE; u++) SOON(soon + u * d + i);
                _tile_loadd(2, a + i, sizeof(uint16_t) * d);
                _tile_loadd(3, b + i * WIDE, 4 * WIDE);
                _tile_dpbf16ps(0, 2, 3);
                if (two) {
                    _tile_loadd(4, c + i * WIDE, 4 * WIDE);
                    _tile_dpbf16ps(1, 2, 4);
                }
            }
            _tile_stored(0, made[0], 4 * WIDE);
            _tile_stored(1, made[1], 4 * WIDE);
            for (int64_t v = 0; v < least(tokens - t, 2 * WIDE); v++)
                for (int64_t u = 0; u < high; u++)
                    out[(t + v) * out_step + j + u] = made[v / WIDE][u][v % WIDE] * weights[(t + v) * weight_step];
        }
    }
}

/* Every tile 16 rows of 64 bytes, for the calling thread. A constant: GCC 12 believes that 8 bytes of it are read. */
BY_AMX static void open_tiles(void) {
    static const struct __attribute__((aligned(64))) {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}

BY_AMX static void close_tiles(void) { _tile_release(); }

/* Two numbers of each of 16 tokens, pair by pair, as a tile wants them; tokens that are not there are zero, and d is a
   multiple of 32. */
BY_AVX512 static void tile_tokens(const uint16_t *x, int64_t tokens, int64_t d, int64_t first, uint16_t *tiles) {
    for (int64_t i = 0; i < d; i += 2 * WIDE) {
        __m512i row[WIDE];
        for (int64_t v = 0; v < WIDE; v++)
            row[v] = first + v < tokens ? _mm512_loadu_si512(x + (first + v) * d + i) : _mm512_setzero_si512();
        transpose(row);
        for (int64_t p = 0; p < WIDE; p++) _mm512_storeu_si512(tiles + i * WIDE + p * 2 * WIDE, row[p]);
    }
}

/* ---- widen: sums[t, o] += Σ_j n[t, j] Bt[j, o], for some columns o and rows j of one Bt ---- */

/* Rows of Bt pair by pair, in tiles [columns / 16, pairs, 16 columns, 2]; what is not there is zero. */
INLINE void tile_rows(const uint16_t *Bt, int64_t step, int64_t high, int64_t columns, const uint16_t *next,
                      int64_t pairs, uint32_t *tiles) {
    static const uint16_t nothing[WIDE] = {0};
    for (int64_t p = 0; p < pairs; p++)
        for (int64_t o = 0; o < columns; o += WIDE) {
            SOON(next + 2 * p * step + o);
            SOON(next + (2 * p + 1) * step + o);
            const uint16_t *even = 2 * p < high ? Bt + 2 * p * step + o : nothing;
            const uint16_t *odd = 2 * p + 1 < high ? Bt + (2 * p + 1) * step + o : nothing;
            uint16_t rest[2][WIDE] = {{0}};
            if (columns - o < WIDE && 2 * p < high) {
                even = memcpy(rest[0], even, sizeof(uint16_t) * (columns - o));
                if (odd != nothing) odd = memcpy(rest[1], odd, sizeof(uint16_t) * (columns - o));
            }
            words both = read_words(even) | read_words(odd) << 16;
            memcpy(tiles + (o / WIDE * pairs + p) * WIDE, &both, sizeof both);
        }
}

/* sums [tokens, broad]; n bf16 [tokens, DEEP], zero where there is no row; tiles as `tile_rows` lays them. */
BY_AVX512 static void widen_pairs(float *sums, int64_t tokens, int64_t broad, const uint32_t *tiles, int64_t pairs,
                                  const uint16_t *n) {
    for (int64_t o = 0; o < broad; o += WIDE, tiles += pairs * WIDE)
        for (int64_t t = 0; t < tokens; t += 8) {
            __m512 part[8];
            const uint16_t *given[8];
            for (int v = 0; v < 8; v++) {
                given[v] = n + (t + (t + v < tokens ? v : 0)) * DEEP;
                part[v] = _mm512_loadu_ps(sums + (t + (t + v < tokens ? v : 0)) * broad + o);
            }
            for (int64_t p = 0; p < pairs; p++) {
                __m512bh read = (__m512bh)_mm512_loadu_si512(tiles + p * WIDE);
                for (int v = 0; v < 8; v++) {
                    int pair;
                    memcpy(&pair, given[v] + 2 * p, sizeof pair);
                    part[v] = _mm512_dpbf16_ps(part[v], (__m512bh)_mm512_set1_epi32(pair), read);
                }
            }
            for (int v = 0; v < least(tokens - t, 8); v++) _mm512_storeu_ps(sums + (t + v) * broad + o, part[v]);
        }
}

/* The same; sums and n have rows for a multiple of 16 tokens. */
BY_AMX static void widen_tiles(float *sums, int64_t tokens, int64_t broad, const uint32_t *tiles, int64_t pairs,
                               const uint16_t *n) {
    WRITTEN;
    for (int64_t o = 0; o < broad; o += WIDE, tiles += pairs * WIDE)
        for (int64_t t = 0; t < tokens; t += 2 * WIDE) {
            int two = t + WIDE < tokens;
            _tile_loadd(0, sums + t * broad + o, 4 * broad);
            if (two) _tile_loadd(1, sums + (t + WIDE) * broad + o, 4 * broad);
            for (int64_t p = 0; p < pairs; p += WIDE) {
                _tile_loadd(3, tiles + p * WIDE, 4 * WIDE);
                _tile_loadd(2, n + t * DEEP + 2 * p, 2 * DEEP);
                _tile_dpbf16ps(0, 2, 3);
                if (two) {
                    _tile_loadd(4, n + (t + WIDE) * DEEP + 2 * p, 2 * DEEP);
                    _tile_dpbf16ps(1, 4, 3);
                }
            }
            _tile_stored(0, sums + t * broad + o, 4 * broad);
            if (two) _tile_stored(1, sums + (t + WIDE) * broad + o, 4 * broad);
        }
}

/* ---- lay: the factors of one target side by side, for a dense product ---- */

/* 32 rows at most of weight · Bt, transposed to columns of B [d_out, step]; rounded once. */
BY_AVX512 static void lay_rows(const uint16_t *Bt, int64_t high, int64_t d_out, const uint16_t *next, float weight,
                               uint16_t *B, int64_t step) {
    const __m512i places = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(WIDE));
    const __m512 times = _mm512_set1_ps(weight);
    const __mmask32 there = (__mmask32)((1ull << high) - 1);
    uint32_t pairs[WIDE][WIDE];
    for (int64_t o = 0; o < d_out; o += WIDE) {
        __mmask16 columns = (__mmask16)((1u << least(d_out - o, WIDE)) - 1);
        for (int64_t j = 0; j < 2 * WIDE; j += 2) {
            __m512i both[2];
            for (int64_t u = 0; u < 2; u++) {
                SOON(next + (j + u) * d_out + o);
                const uint16_t *row = Bt + (j + u < high ? j + u : 0) * d_out + o;
                __m512i read = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, row));
                __m512 made = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(read, 16)), times);
                both[u] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(made));
            }
            _mm512_storeu_si512(pairs[j / 2], _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16)));
        }
        for (int64_t v = 0; v < least(d_out - o, WIDE); v++)
            _mm512_mask_storeu_epi16(B + (o + v) * step, there, _mm512_i32gather_epi32(places, &pairs[0][v], 4));
    }
}

/* ---- merge: out = base + Σ_k weights_k B_k A_k of one linear, in blocks of 32 rows and columns ---- */

/* Threads take parts of linears in turn. A part of A stays in tiles in the second cache, while Bt goes by, 32 of its
   columns at a time; the products are summed in tiles, and go past the caches into `out`. By AMX alone. */
#define RESIDENT (1 << 20) /* bytes of A that stay in the second cache while Bt goes by */
#define PASS 24 /* steps at most that are summed at a time, over a whole part of `out` */
#define GROUP 1536 /* rows of out for which A is laid once */

struct rows { /* of all experts, one by one: where each of A and of Bt begins, and its weight */
    const uint16_t **A, **Bt;
    float *weights;
    int64_t count, steps; /* 32 a step */
};

struct block { /* sums [32, 32], columns as `interleave` leaves them, that are still to be added to `base`; or none */
    const float *sums;
    const uint16_t *base;
    uint16_t *out;
    int64_t high, broad, d;
};

/* 32 columns of A in tiles [steps, 2, 16 pairs, 16 columns, 2], the columns of a tile four of every eight. */
BY_AVX512 static void interleave(const struct rows *all, int64_t step, int64_t column, int64_t broad, uint16_t *tiles) {
    __mmask32 there = low_bits(broad);
    for (int64_t k = step * SIDE; k < (step + 1) * SIDE; k += 2, tiles += SIDE) {
        for (int64_t u = k + SIDE; u < least(k + SIDE + 2, all->count); u++) SOON(all->A[u] + column);
        __m512i even = _mm512_setzero_si512(), odd = even;
        if (k < all->count) even = _mm512_maskz_loadu_epi16(there, all->A[k] + column);
        if (k + 1 < all->count) odd = _mm512_maskz_loadu_epi16(there, all->A[k + 1] + column);
        _mm512_store_si512(tiles, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(tiles + WIDE * SIDE, _mm512_unpackhi_epi16(even, odd));
    }
}

/* 32 columns of weights · Bt, rounded once, in tiles [2, 16 columns, 32 rows]: even columns, then odd ones. */
BY_AVX512 static void turn(const struct rows *all, int64_t step, int64_t column, int64_t broad, uint16_t *tiles) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    static const uint16_t order[2 * WIDE] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = _mm512_loadu_si512(order);
    __mmask32 there = low_bits(broad);
    __m512i even[WIDE], odd[WIDE];
    for (int64_t p = 0; p < WIDE; p++) {
        __m512 part[2][2];
        for (int64_t u = 0; u < 2; u++) {
            int64_t k = step * SIDE + 2 * p + u;
            __m512i read = _mm512_setzero_si512();
            if (k < all->count) read = _mm512_maskz_loadu_epi16(there, all->Bt[k] + column);
            __m512 times = _mm512_set1_ps(all->weights[k]);
            part[0][u] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(read, 16)), times);
            part[1][u] = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(read, high)), times);
        }
        even[p] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(part[0][1], part[0][0]));
        odd[p] = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(part[1][1], part[1][0]));
    }
    transpose(even);
    for (int64_t v = 0; v < WIDE; v++) _mm512_store_si512(tiles + v * SIDE, even[v]);
    transpose(odd);
    for (int64_t v = 0; v < WIDE; v++) _mm512_store_si512(tiles + (WIDE + v) * SIDE, odd[v]);
}

/* Row v of a block, whose even rows are in its upper half: base + sums, rounded once, past the caches where it can. */
BY_AVX512 INLINE void finish(const struct block *made, int64_t v) {
    if (v >= made->high) return;
    const __m512i nothing = _mm512_setzero_si512(), order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const float *sums = made->sums + (v / 2 + v % 2 * WIDE) * SIDE;
    __mmask32 there = low_bits(made->broad);
    __m512i base = _mm512_maskz_loadu_epi16(there, made->base + v * made->d);
    __m512 left = _mm512_castsi512_ps(_mm512_unpacklo_epi16(nothing, base));
    __m512 right = _mm512_castsi512_ps(_mm512_unpackhi_epi16(nothing, base));
    left = _mm512_add_ps(left, _mm512_load_ps(sums));
    right = _mm512_add_ps(right, _mm512_load_ps(sums + WIDE));
    __m512i both = _mm512_permutexvar_epi64(order, (__m512i)_mm512_cvtne2ps_pbh(right, left));
    uint16_t *out = made->out + v * made->d;
    if (made->broad >= SIDE && (uintptr_t)out % 64 == 0)
        _mm512_stream_si512((void *)out, both);
    else
        _mm512_mask_storeu_epi16(out, there, both);
}

/* Rows of Bt that are read ahead, from `column` on: so many a step. */
struct coming {
    const uint16_t **rows;
    int64_t count, share, column;
};

/* The sums of one block. Meanwhile the block `before` is finished, and what comes is read ahead, base first. */
BY_AMX static void multiply(const uint16_t *b, const uint16_t *a, int64_t steps, float *sums,
                            int again, const struct block *before, const struct block *now,
                            const struct coming *coming) {
    int64_t share = (SIDE + steps - 1) / steps;
    WRITTEN;
    if (again) {
        _tile_loadd(0, sums, 8 * WIDE);
        _tile_loadd(1, sums + WIDE, 8 * WIDE);
        _tile_loadd(2, sums + WIDE * SIDE, 8 * WIDE);
        _tile_loadd(3, sums + WIDE * SIDE + WIDE, 8 * WIDE);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s++, a += SIDE * SIDE, b += SIDE * SIDE) {
        _tile_loadd(4, b, 4 * WIDE);
        _tile_loadd(6, a, 4 * WIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, a + WIDE * SIDE, 4 * WIDE);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, b + WIDE * SIDE, 4 * WIDE);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int64_t v = s * share; v < least((s + 1) * share, SIDE); v++) {
            if (now->base) {
                const uint16_t *base = now->base + least(v, now->high - 1) * now->d;
                SOON(base);
                SOON(base + SIDE - 1); /* another line of memory, unless base is aligned */
            }
            if (before->sums) finish(before, v);
        }
        for (int64_t k = s * coming->share; k < least((s + 1) * coming->share, coming->count); k++)
            SOON(coming->rows[k] + coming->column);
    }
    _tile_stored(0, sums, 8 * WIDE);
    _tile_stored(1, sums + WIDE, 8 * WIDE);
    _tile_stored(2, sums + WIDE * SIDE, 8 * WIDE);
    _tile_stored(3, sums + WIDE * SIDE + WIDE, 8 * WIDE);
}

struct linear { /* see localmoe_merge */
    const uint16_t *base;
    uint16_t *out;
    int64_t d, d_out;
};

/* Rows first .. last and columns left .. right of out, one pass after the other; between them the sums wait in `held`. */
BY_AMX static void merge_part(const struct linear *one, const struct rows *all, int64_t first, int64_t last,
                              int64_t left, int64_t right, uint16_t *resident, uint16_t *passing, float *held) {
    float __attribute__((aligned(64))) sums[2 * SIDE * SIDE];
    struct block before = {0};
    int64_t d = one->d, blocks = (right - left + SIDE - 1) / SIDE, passes = (all->steps + PASS - 1) / PASS;
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t step = all->steps * pass / passes, steps = all->steps * (pass + 1) / passes - step, turns = 0;
        for (int64_t s = 0; s < steps; s++)
            for (int64_t i = 0; i < blocks; i++)
                interleave(all, step + s, left + i * SIDE, right - left - i * SIDE,
                           resident + (i * steps + s) * SIDE * SIDE);
        for (int64_t o = first; o < last; o += SIDE) {
            int64_t share = (SIDE + blocks - 1) / blocks;
            int64_t nexts = o + SIDE < last ? least((step + steps) * SIDE, all->count) - step * SIDE : 0;
            for (int64_t s = 0; s < steps; s++) turn(all, step + s, o, last - o, passing + s * SIDE * SIDE);
            for (int64_t i = 0; i < blocks; i++, turns++) {
                int64_t column = left + i * SIDE, at = o * d + column, begin = least(i * steps * share, nexts);
                float *to = passes > 1 ? held + turns * SIDE * SIDE : sums + turns % 2 * SIDE * SIDE;
                struct block now = {0};
                if (pass == passes - 1)
                    now = (struct block){to, one->base + at, one->out + at, least(last - o, SIDE), right - column, d};
                struct coming coming = {all->Bt + step * SIDE + begin, nexts - begin, share, o + SIDE};
                multiply(passing, resident + i * steps * SIDE * SIDE, steps, to, pass > 0, &before, &now, &coming);
                before = now;
            }
        }
    }
    for (int64_t v = 0; v < SIDE; v++) finish(&before, v);
    _mm_sfence(); /* what went past the caches is there before other threads read it */
}

static int64_t steps_of(int64_t rows) { return rows > 0 ? (rows + SIDE - 1) / SIDE : 1; } /* none: one of zeros */

/* Columns of A that are laid at a time: as many as shall stay, of all parts about as many. */
static int64_t columns_of(int64_t d, int64_t steps) {
    int64_t fit = RESIDENT / (least(steps, PASS) * SIDE * SIDE * (int64_t)sizeof(uint16_t));
    int64_t blocks = (d + SIDE - 1) / SIDE, parts = (blocks + fit - 1) / fit;
    return (blocks + parts - 1) / parts * SIDE;
}

struct room { /* of one thread */
    struct rows all;
    uint16_t *passing, *resident;
    float *held;
};

/* Bytes of it, for linears of at most so many steps; a multiple of 64. */
static int64_t room_bytes(int64_t steps) {
    int64_t listed = 2 * sizeof(uint16_t *) + sizeof(float), row = SIDE * sizeof(uint16_t);
    int64_t held = steps > PASS ? RESIDENT / (PASS * row) * GROUP * (int64_t)sizeof(float) : 0;
    return steps * SIDE * listed + PASS * SIDE * row + RESIDENT + held;
}

static struct room room_in(char *memory, int64_t steps) {
    struct room room;
    room.all.A = (const uint16_t **)(void *)memory;
    room.all.Bt = room.all.A + steps * SIDE;
    room.all.weights = (float *)(void *)(room.all.Bt + steps * SIDE);
    room.passing = (uint16_t *)(void *)(room.all.weights + steps * SIDE);
    room.resident = room.passing + PASS * SIDE * SIDE;
    room.held = (float *)(void *)(room.resident + RESIDENT / sizeof(uint16_t));
    return room;
}

static void list_rows(const struct linear *one, const uint16_t *const *A, const uint16_t *const *Bt,
                      const int64_t *rows, int64_t experts, const float *weights, struct rows *all) {
    all->count = 0;
    for (int64_t k = 0; k < experts; k++)
        for (int64_t j = 0; j < rows[k]; j++, all->count++) {
            all->A[all->count] = A[k] + j * one->d;
            all->Bt[all->count] = Bt[k] + j * one->d_out;
            all->weights[all->count] = weights[k];
        }
    all->steps = steps_of(all->count);
    for (int64_t k = all->count; k < all->steps * SIDE; k++) all->weights[k] = 0;
}

/* ---- rows: y[t, o] += Σ_j n[t, j] Bt[j, o] for the few tokens of one row, whose Bt no other row reads ---- */

/* Numbers of a word each as two vectors of floats: those in the lower halves, and those in the upper. */
struct both { __m512 lower, upper; };

BY_AVX512 INLINE struct both read_both(const uint16_t *from, __mmask32 there) {
    __m512i read = _mm512_maskz_loadu_epi16(there, from), upper = _mm512_set1_epi32((int)0xffff0000);
    struct both made = {_mm512_castsi512_ps(_mm512_slli_epi32(read, 16)),
                        _mm512_castsi512_ps(_mm512_and_si512(read, upper))};
    return made;
}

BY_AVX512 INLINE void write_both(uint16_t *to, struct both sums, __mmask32 there) {
    __m512i lower = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sums.lower));
    __m512i upper = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sums.upper));
    _mm512_mask_storeu_epi16(to, there, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
}

/* Plain sums of one or two tokens, 128 columns of one row of Bt after another; the other token, if there is none, is the
   same one. `soon`: what will be read after these columns. */
BY_AVX512 INLINE void widen_strip(int two, uint16_t *const *y, int64_t columns, const uint16_t *Bt, int64_t step,
                                  int64_t rows, const float *const *n, const uint16_t *soon) {
    __mmask32 there[4];
    struct both sums[2][4];
    for (int u = 0; u < 4; u++) {
        there[u] = low_bits(columns - u * SIDE);
        for (int v = 0; v <= two; v++) sums[v][u] = read_both(y[v] + u * SIDE, there[u]);
    }
    for (int64_t j = 0; j < rows; j++)
        for (int u = 0; u < 4; u++) {
            struct both read = read_both(Bt + j * step + u * SIDE, there[u]);
            SOON(soon + j * step + u * SIDE);
            for (int v = 0; v <= two; v++) {
                __m512 times = _mm512_set1_ps(n[v][j]);
                sums[v][u].lower = _mm512_fmadd_ps(times, read.lower, sums[v][u].lower);
                sums[v][u].upper = _mm512_fmadd_ps(times, read.upper, sums[v][u].upper);
            }
        }
    for (int u = 0; u < 4; u++)
        for (int v = 0; v <= two; v++) write_both(y[v] + u * SIDE, sums[v][u], there[u]);
}

/* All tokens of one row of a batch; every number of Bt comes from memory once. `next`: what will be read after it. */
BY_AVX512 static void widen_row(uint16_t *y, int64_t tokens, int64_t y_step, int64_t columns, const uint16_t *Bt,
                                int64_t step, int64_t rows, const float *n, int64_t n_step, const uint16_t *next) {
    for (int64_t o = 0; o < columns; o += 4 * SIDE) {
        const uint16_t *soon = o + 4 * SIDE < columns ? Bt + o + 4 * SIDE : next;
        for (int64_t t = 0; t < tokens; t += 2) {
            uint16_t *to[2] = {y + t * y_step + o, y + (t + 1) * y_step + o};
            const float *by[2] = {n + t * n_step, n + (t + 1) * n_step};
            if (t + 1 < tokens)
                widen_strip(1, to, columns - o, Bt + o, step, rows, by, soon);
            else
                widen_strip(0, to, columns - o, Bt + o, step, rows, by, soon);
        }
    }
}

/* ---- one thread's part of a product, once for each level ---- */

struct factors { /* of the active experts: where each begins, its rows, and its place in a row of n */
    const uint16_t *const *from;
    const int64_t *rows, *places;
    int64_t count;
};

struct narrow { /* see localmoe_narrow */
    const void *x;
    int64_t tokens, d;
    struct factors A;
    const float *weights;
    int64_t weight_step;
    float *out;
    int64_t out_step;
};

INLINE void narrow_part(int level, const struct narrow *all, uint16_t *tail, int64_t part, int64_t parts) {
    struct factors A = all->A;
    int64_t blocks = 0, seen = 0, d = all->d;
    for (int64_t k = 0; k < A.count; k++) blocks += (A.rows[k] + WIDE - 1) / WIDE;
    int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
    for (int64_t k = 0; k < A.count; seen += (A.rows[k++] + WIDE - 1) / WIDE) {
        int64_t begin = (first > seen ? first - seen : 0) * WIDE, end = least((last - seen) * WIDE, A.rows[k]);
        if (end <= begin) continue;
        const uint16_t *from = A.from[k] + begin * d, *next = k + 1 < A.count ? A.from[k + 1] : from;
        const float *weights = all->weights + k;
        float *out = all->out + A.places[k] + begin;
        if (level == 2)
            narrow_tiles(all->x, all->tokens, d, from, end - begin, next, weights, all->weight_step, out,
                         all->out_step, tail);
        else
            narrow_pairs(all->x, all->tokens, d, from, end - begin, next, weights, all->weight_step, out,
                         all->out_step);
    }
}

struct widen { /* see localmoe_widen */
    uint16_t *y;
    int64_t tokens, d_out;
    struct factors Bt;
    const float *n;
    int64_t n_step;
};

INLINE void widen_part(int level, const struct widen *all, int64_t first, int64_t columns, float *sums, uint32_t *tiles,
                       uint16_t *given) {
    int64_t tokens = all->tokens, d_out = all->d_out, broad = (columns + WIDE - 1) / WIDE * WIDE;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t o = 0; o < columns; o++) sums[t * broad + o] = one(all->y[t * d_out + first + o]);
    for (int64_t k = 0; k < all->Bt.count; k++)
        for (int64_t j = 0; j < all->Bt.rows[k]; j += DEEP) {
            int64_t high = least(all->Bt.rows[k] - j, DEEP);
            const uint16_t *from = all->Bt.from[k] + j * d_out + first;
            const float *n = all->n + all->Bt.places[k] + j;
            int64_t pairs = level == 2 ? (high + 2 * WIDE - 1) / (2 * WIDE) * WIDE : (high + 1) / 2;
            const uint16_t *next = j + DEEP < all->Bt.rows[k]  ? from + DEEP * d_out
                                   : k + 1 < all->Bt.count ? all->Bt.from[k + 1] + first
                                                           : from;
            tile_rows(from, d_out, high, columns, next, pairs, tiles);
            for (int64_t t = 0; t < tokens; t++) {
                for (int64_t i = 0; i < high; i++) given[t * DEEP + i] = rounded(n[t * all->n_step + i]);
                for (int64_t i = high; i < 2 * pairs; i++) given[t * DEEP + i] = 0;
            }
            if (level == 2)
                widen_tiles(sums, tokens, broad, tiles, pairs, given);
            else
                widen_pairs(sums, tokens, broad, tiles, pairs, given);
        }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t o = 0; o < columns; o++) all->y[t * d_out + first + o] = rounded(sums[t * broad + o]);
}

BY_AVX512 static void sum_part(const uint16_t *const *from, const float *weights, int64_t count, int64_t start,
                               int64_t length, uint16_t *out) {
    float sums[SUMMED] = {0};
    for (int64_t k = 0; k < count; k++) {
        const uint16_t *read = from[k] + start, *next = from[least(k + 1, count - 1)] + start;
        for (int64_t i = 0; i < length; i += 2 * WIDE) { /* a line of memory */
            SOON(next + i);
            for (int64_t j = i; j < least(i + 2 * WIDE, length); j++) sums[j] += weights[k] * one(read[j]);
        }
    }
    for (int64_t i = 0; i < length; i++) out[start + i] = rounded(sums[i]);
}

#define LEVEL(number, TARGET)                                                                                        \
    TARGET static void narrow_##number(const struct narrow *all, uint16_t *tail, int64_t part, int64_t parts) {      \
        narrow_part(number, all, tail, part, parts);                                                                 \
    }                                                                                                                \
    TARGET static void widen_##number(const struct widen *all, int64_t first, int64_t columns, float *sums,          \
                                      uint32_t *tiles, uint16_t *given) {                                            \
        widen_part(number, all, first, columns, sums, tiles, given);                                                 \
    }
LEVEL(1, BY_AVX512)
LEVEL(2, BY_AMX)

/* ---- what is called ---- */

/* The level of this machine; asks the system for the use of tiles. */
int localmoe_level(void) {
    unsigned a, b, c, d, tiles = 1u << 22 | 1u << 24;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl"))
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles) return 1;
    return syscall(SYS_arch_prctl, 0x1023, 18) ? 1 : 2; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
}

static int64_t padded(int64_t tokens) { return (tokens + 2 * WIDE - 1) / (2 * WIDE) * (2 * WIDE); }

/* Bytes of the buffer that `localmoe_narrow` (d_out = 0) or `localmoe_widen` (d = 0) needs. */
int64_t localmoe_bytes(int64_t tokens, int64_t d, int64_t d_out, int64_t threads) {
    int64_t columns = d_out / threads + 4 * WIDE;
    int64_t own = WIDE * d * 2 + padded(tokens) * (columns * 4 + DEEP * 2) + DEEP * columns * 2;
    return padded(tokens) * d * 2 + threads * own;
}

/* out[t, places_k + j] = weights[t · weight_step + k] · Σ_i x[t, i] A_k[j, i]: x [tokens, d] bf16, A_k [rows_k, d]
   bf16, out [tokens, out_step] fp32; d is a multiple of 32. */
void localmoe_narrow(int level, int64_t threads, const uint16_t *x, int64_t tokens, int64_t d,
                     const uint16_t *const *A, const int64_t *rows, const int64_t *places, int64_t experts,
                     const float *weights, int64_t weight_step, float *out, int64_t out_step, char *buffer) {
    struct narrow all = {x, tokens, d, {A, rows, places, experts}, weights, weight_step, out, out_step};
    uint16_t *tiles = (uint16_t *)(void *)buffer, *tails = tiles + padded(tokens) * d;
    if (level == 2) all.x = tiles;
#pragma omp parallel num_threads(threads)
    {
        if (level == 2) {
#pragma omp for
            for (int64_t t = 0; t < padded(tokens); t += WIDE) tile_tokens(x, tokens, d, t, tiles + t * d);
        }
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < threads; part++)
            if (level == 2) {
                open_tiles();
                narrow_2(&all, tails + part * WIDE * d, part, threads);
                close_tiles();
            } else
                narrow_1(&all, tails, part, threads);
    }
}

/* y[t, o] += Σ_k Σ_j n[t, places_k + j] Bt_k[j, o]: y [tokens, d_out] bf16, Bt_k [rows_k, d_out] bf16,
   n [tokens, n_step] fp32. */
void localmoe_widen(int level, int64_t threads, uint16_t *y, int64_t tokens, int64_t d_out,
                    const uint16_t *const *Bt, const int64_t *rows, const int64_t *places, int64_t experts,
                    const float *n, int64_t n_step, char *buffer) {
    struct widen all = {y, tokens, d_out, {Bt, rows, places, experts}, n, n_step};
    int64_t units = (d_out + 2 * WIDE - 1) / (2 * WIDE), bytes = localmoe_bytes(tokens, 0, d_out, threads) / threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        int64_t first = units * part / threads * 2 * WIDE;
        int64_t last = least(units * (part + 1) / threads * 2 * WIDE, d_out);
        if (last <= first) continue;
        int64_t broad = (last - first + WIDE - 1) / WIDE * WIDE;
        float *sums = (float *)(void *)(buffer + part * bytes);
        uint32_t *tiles = (uint32_t *)(void *)(sums + padded(tokens) * broad);
        uint16_t *given = (uint16_t *)(void *)(tiles + DEEP / 2 * broad);
        if (level == 2) {
            open_tiles();
            widen_2(&all, first, last - first, sums, tiles, given);
            close_tiles();
        } else
            widen_1(&all, first, last - first, sums, tiles, given);
    }
}

/* y[i, t, o] += Σ_j n[i, t, j] Bt_i[j, o], where Bt_i [rank, d_out] bf16 begins `sets_i · set_step` numbers after Bt:
   y [rows, tokens, d_out] bf16, n [rows · tokens, n_step] fp32. */
void localmoe_widen_rows(int64_t threads, uint16_t *y, int64_t rows, int64_t tokens, int64_t d_out, const uint16_t *Bt,
                         const int64_t *sets, int64_t set_step, int64_t rank, const float *n, int64_t n_step) {
    int64_t units = (d_out + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        int64_t first = units * part / threads * SIDE, end = least(units * (part + 1) / threads * SIDE, d_out);
        for (int64_t i = 0; i < rows; i++)
            widen_row(y + i * tokens * d_out + first, tokens, d_out, end - first, Bt + sets[i] * set_step + first, d_out,
                      rank, n + i * tokens * n_step, n_step, Bt + sets[least(i + 1, rows - 1)] * set_step + first);
    }
}

/* A [Σ rows, d] = the A_k under one another; B [d_out, Σ rows] = the weights_k · Bt_k, transposed, beside one another. */
void localmoe_lay(int64_t threads, const uint16_t *const *A, const uint16_t *const *Bt, const int64_t *rows,
                  int64_t experts, int64_t d, int64_t d_out, const float *weights, uint16_t *all_A, uint16_t *all_B) {
    int64_t total = 0, deep = 2 * WIDE;
    for (int64_t k = 0; k < experts; k++) total += rows[k];
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++)
        for (int64_t k = 0, place = 0, block = 0; k < experts; place += rows[k++])
            for (int64_t j = 0; j < rows[k]; j += deep, block++) {
                if (block % threads != part) continue;
                int64_t high = least(rows[k] - j, deep), soon = j + deep * threads;
                const uint16_t *next = soon < rows[k]    ? Bt[k] + soon * d_out
                                       : k + 1 < experts ? Bt[k + 1] + j % (deep * threads) * d_out
                                                         : Bt[k];
                memcpy(all_A + (place + j) * d, A[k] + j * d, sizeof(uint16_t) * high * d);
                lay_rows(Bt[k] + j * d_out, high, d_out, next, weights[k], all_B + place + j, total);
            }
}

/* Bytes of the buffer that `localmoe_merge` needs for linears with at most `most` rows of all experts. */
int64_t localmoe_merge_bytes(int64_t most, int64_t threads) { return threads * room_bytes(steps_of(most)) + 64; }

/* out_l = base_l + Σ_k weights_k Bt_lkᵀ A_lk for every linear l: base_l and out_l [d_out_l, d_l], A_lk [rows_lk, d_l],
   Bt_lk [rows_lk, d_out_l], bf16; addresses and rows are [linears, experts]. weights_k · Bt_lk is rounded to bf16. */
void localmoe_merge(int64_t threads, int64_t linears, const int64_t *d, const int64_t *d_out,
                    const uint16_t *const *base, uint16_t *const *out, const uint16_t *const *A,
                    const uint16_t *const *Bt, const int64_t *rows, int64_t experts, const float *weights,
                    int64_t most, char *buffer) {
    int64_t taken = 0, steps = steps_of(most);
    buffer += -(uintptr_t)buffer % 64;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t part = 0; part < threads; part++) {
        struct room room = room_in(buffer + part * room_bytes(steps), steps);
        int64_t mine, seen = 0;
#pragma omp atomic capture
        mine = taken++;
        open_tiles();
        for (int64_t l = 0; l < linears; l++) {
            struct linear one = {base[l], out[l], d[l], d_out[l]};
            list_rows(&one, A + l * experts, Bt + l * experts, rows + l * experts, experts, weights, &room.all);
            int64_t columns = columns_of(one.d, room.all.steps);
            for (int64_t left = 0; left < one.d; left += columns)
                for (int64_t first = 0; first < one.d_out; first += GROUP) {
                    if (seen++ != mine) continue;
                    merge_part(&one, &room.all, first, least(first + GROUP, one.d_out), left,
                               least(left + columns, one.d), room.resident, room.passing, room.held);
#pragma omp atomic capture
                    mine = taken++;
                }
        }
        close_tiles();
    }
}

/* out_s = Σ_k weights_sk · from_sk of `size` numbers, one after another: counts_s parts of every set s. */
void localmoe_sums(int64_t threads, const uint16_t *const *from, const float *weights, const int64_t *counts,
                   int64_t sets, int64_t size, uint16_t *out) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < size; start += SUMMED)
        for (int64_t s = 0, seen = 0; s < sets; seen += counts[s++])
            sum_part(from + seen, weights + seen, counts[s], start, least(size - start, SUMMED), out + s * size);
}

int localmoe_version(void) { return 3; } /* one more whenever a function here changes; see kernels.py */
#endif
