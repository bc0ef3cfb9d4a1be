// The hash of ../reference/random.py, bit for bit. Sources that need noise begin with this file.

typedef long long Index;
typedef unsigned int Word;

__device__ Word hash32(Word h) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ h >> 16;
}

__device__ Word row_hash(Word word, Index row) { return hash32(hash32((Word)(row >> 32) ^ word) ^ (Word)row); }

__device__ Word column_hash(Word word, Index column) { return hash32((Word)column ^ hash32(word ^ 0x9E3779B9u)); }

__device__ Word random_word(Word word, Index row, Index column) {
    return hash32(row_hash(word, row) ^ column_hash(word, column));
}
