//! How results reach memory: around the caches where they are larger than those, while the next block of the inputs is asked for.
//!
//! An ordinary store reads its cache line first, which a large result pays for with half as much traffic again, and then pushes out what
//! the caches hold. And a processor follows an input to the end of a page of 4 KiB, not beyond. So a block is made in a buffer
//! that stays in the first-level cache; writing it out line by line, the lines of the inputs' next block are asked for in between, so that
//! both ways are busy. Measured in one thread beside memcpy of as many bytes (256 MiB, small pages, Xeon of 2.8 GHz): an addition
//! of `f32` 1.2 for 1.6 with ordinary stores, 1.5 without the asking; filling 0.9 for 2.2; a transposed copy 1.5 to 1.8 for 6 to 7.
//!
//! Invariant W1: stores around the caches are fenced before their bytes can be reached in another way: [`Out`] borrows them, and
//! fences when it is dropped.
#![expect(unsafe_code, reason = "stores around the caches, prefetches and shuffles are intrinsics")]

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Results from this size on go around the caches: who reads them next would find little of them there.
const AROUND_BYTES_MIN: usize = 8 << 20;

/// What a kernel reads next, of each input: a hint.
pub(crate) type Ahead<'a> = [&'a [u8]; 3];

/// No hint.
pub(crate) const NOTHING: Ahead<'static> = [&[]; 3];

/// Whether a result of `len` bytes goes around the caches.
pub(crate) fn goes_around(len: usize) -> bool {
    len >= AROUND_BYTES_MIN
}

/// Bytes of a result that one thread writes.
pub(crate) struct Out<'a> {
    target: &'a mut [u8],
    is_around: bool,
    /// Where a block is made that goes around the caches.
    made: Vec<Page>,
}

/// Blocks start at pages, as large tensors do: a store whose place in its page is just before that of a later load delays it.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

impl<'a> Out<'a> {
    /// The way to `target`, a part of a result that goes around the caches or does not.
    pub(crate) fn new(target: &'a mut [u8], is_around: bool) -> Self {
        Self { target, is_around, made: Vec::new() }
    }

    /// Has `make` write blocks of `block_bytes`, the last of which may be shorter, from the first to the last. It is given a block's
    /// number, and says what it reads for the next one, or ends the loop by `None`.
    pub(crate) fn blocks<'i>(
        &mut self,
        block_bytes: usize,
        mut make: impl FnMut(usize, &mut [u8]) -> Option<Ahead<'i>>,
    ) {
        for (index, block) in self.target.chunks_mut(block_bytes).enumerate() {
            if !self.is_around {
                if make(index, block).is_none() {
                    return;
                }
                continue;
            }
            if self.made.is_empty() {
                self.made.resize(block.len().div_ceil(PAGE), bytemuck::Zeroable::zeroed());
            }
            let made = &mut bytemuck::cast_slice_mut(&mut self.made)[..block.len()];
            let Some(ahead) = make(index, made) else { return };
            store(block, made, ahead);
        }
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.target.len()
    }

    /// Writes `source` from byte `at` on; what follows it is read next.
    pub(crate) fn put(&mut self, at: usize, source: &[u8], ahead: &[u8]) {
        let target = &mut self.target[at..at + source.len()];
        if self.is_around {
            store(target, source, [ahead, &[], &[]]);
        } else {
            target.copy_from_slice(source);
        }
    }
}

impl Out<'_> {
    /// Fills all with `line`, again and again: from registers, so that nothing is read.
    pub(crate) fn fill(&mut self, line: &[u8; LINE]) {
        let head = if self.is_around { self.target.as_ptr().align_offset(LINE).min(self.target.len()) } else { 0 };
        let (front, target) = self.target.split_at_mut(head);
        front.copy_from_slice(&line[..head]);
        let mut shifted = *line;
        shifted.rotate_left(head % LINE);
        let (lines, rest) = target.as_chunks_mut::<LINE>();
        rest.copy_from_slice(&shifted[..rest.len()]);
        #[cfg(target_arch = "x86_64")]
        if self.is_around {
            return lines.iter_mut().for_each(|line| store_line(line, &shifted));
        }
        lines.fill(shifted);
    }

    /// Writes the front of a line from byte `at` on, whole ones around the caches.
    #[inline]
    pub(crate) fn put_line(&mut self, at: usize, source: &[u8; LINE], len: usize) {
        let target = &mut self.target[at..at + len];
        match <&mut [u8; LINE]>::try_from(&mut *target) {
            #[cfg(target_arch = "x86_64")]
            Ok(line) if self.is_around && line.as_ptr().addr().is_multiple_of(LINE) => store_line(line, source),
            _ => target.copy_from_slice(&source[..len]),
        }
    }
}

impl Drop for Out<'_> {
    /// W1.
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.is_around {
            // SAFETY: a fence, which every x86-64 has.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }
}

/// Copies `source` around the caches, whole lines at least, and asks for `ahead` evenly meanwhile. The caller fences: W1.
#[cfg(target_arch = "x86_64")]
fn store(target: &mut [u8], source: &[u8], ahead: Ahead<'_>) {
    let head = target.as_ptr().align_offset(LINE).min(target.len());
    let (front, target) = target.split_at_mut(head);
    front.copy_from_slice(&source[..head]);
    let (lines, rest) = target.as_chunks_mut::<LINE>();
    let (source_lines, source_rest) = source[head..].as_chunks::<LINE>();
    let count = lines.len();
    // As many lines of an input are asked for as its share is behind.
    let mut asked = ahead.map(|bytes| (bytes, bytes.len().div_ceil(LINE), 0_usize, 0_usize));
    for (line, source) in lines.iter_mut().zip(source_lines) {
        for (bytes, per_count, credit, next) in &mut asked {
            *credit += *per_count;
            while *credit >= count {
                *credit -= count;
                ask(bytes, *next);
                *next += LINE;
            }
        }
        store_line(line, source);
    }
    rest.copy_from_slice(source_rest);
}

/// Stores a line, which starts at a multiple of one, around the caches. The caller fences: W1.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn store_line(line: &mut [u8; LINE], source: &[u8; LINE]) {
    use std::arch::x86_64::{__m128i, _mm_stream_si128};
    assert!(line.as_ptr().addr().is_multiple_of(LINE), "a line of its own");
    let (source, _) = source.as_chunks::<16>();
    for (quarter, source) in line.as_chunks_mut::<16>().0.iter_mut().zip(source) {
        let vector: __m128i = bytemuck::pod_read_unaligned(source);
        // SAFETY: 16 bytes of our own, aligned as the line is.
        unsafe { _mm_stream_si128(quarter.as_mut_ptr().cast(), vector) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn store(target: &mut [u8], source: &[u8], _: Ahead<'_>) {
    target.copy_from_slice(source);
}

/// Asks for the line that has byte `at` of `bytes`, if there is one.
pub(crate) fn ask(bytes: &[u8], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, at);
}

/// A tile whose sides are a cache line: at most as many lines as a line has bytes.
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [[u8; LINE]; LINE]);

impl Tile {
    pub(crate) fn new() -> Self {
        Self([[0; LINE]; LINE])
    }

    /// Fills it with the transposed elements, of `SIZE` bytes each, of as many rows as a line has elements. Rows are `stride` bytes apart.
    pub(crate) fn transpose<const SIZE: usize>(&mut self, source: &[u8], stride: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 has SSE2.
        unsafe {
            transpose_by_vectors::<SIZE>(source, stride, &mut self.0);
        }
        #[cfg(not(target_arch = "x86_64"))]
        transpose_by_elements::<SIZE>(source, stride, &mut self.0);
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn transpose_by_elements<const SIZE: usize>(source: &[u8], stride: usize, tile: &mut [[u8; LINE]; LINE]) {
    for row in 0..LINE / SIZE {
        let (elements, _) = source[row * stride..row * stride + LINE].as_chunks::<SIZE>();
        for (column, element) in elements.iter().enumerate() {
            tile[column][row * SIZE..(row + 1) * SIZE].copy_from_slice(element);
        }
    }
}

/// By squares of vectors: there are four times four of them, whatever the elements' size.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
fn transpose_by_vectors<const SIZE: usize>(source: &[u8], stride: usize, tile: &mut [[u8; LINE]; LINE]) {
    use std::arch::x86_64::{__m128i, _mm_setzero_si128};
    const VECTOR: usize = 16;
    let side = VECTOR / SIZE;
    for down in 0..4 {
        for across in 0..4 {
            let mut rows: [__m128i; VECTOR] = [_mm_setzero_si128(); VECTOR];
            for (index, row) in rows[..side].iter_mut().enumerate() {
                let start = (down * side + index) * stride + across * VECTOR;
                *row = bytemuck::pod_read_unaligned(&source[start..start + VECTOR]);
            }
            // Interleaving the two halves as often as they can be halved transposes them.
            for _ in 0..side.ilog2() {
                let mut next = rows;
                for index in 0..side / 2 {
                    [next[2 * index], next[2 * index + 1]] = interleave::<SIZE>(rows[index], rows[index + side / 2]);
                }
                rows = next;
            }
            for (index, row) in rows[..side].iter().enumerate() {
                tile[across * side + index][down * VECTOR..(down + 1) * VECTOR]
                    .copy_from_slice(bytemuck::bytes_of(row));
            }
        }
    }
}

/// The elements of two vectors in turn.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
fn interleave<const SIZE: usize>(
    a: std::arch::x86_64::__m128i,
    b: std::arch::x86_64::__m128i,
) -> [std::arch::x86_64::__m128i; 2] {
    use std::arch::x86_64::*;
    match SIZE {
        1 => [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)],
        2 => [_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b)],
        4 => [_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)],
        _ => [_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w1_every_byte_arrives_from_any_place_in_any_length() {
        let source: Vec<u8> = (0..1000_usize).map(|index| (index * 7) as u8).collect();
        for is_around in [false, true] {
            for start in 0..70 {
                for len in [0, 1, 63, 64, 65, 300, 900] {
                    let mut target = vec![0xee_u8; 1000];
                    Out::new(&mut target[start..start + len], is_around).put(0, &source[..len], &source);
                    assert_eq!(target[start..start + len], source[..len], "{len} from {start}");
                    Out::new(&mut target[start..start + len], is_around)
                        .fill(&std::array::from_fn(|at| 100 + at as u8));
                    assert!((0..len).all(|at| target[start + at] == 100 + (at % LINE) as u8), "{len} from {start}");
                    assert!(target[..start].iter().chain(&target[start + len..]).all(|byte| *byte == 0xee));
                }
            }
        }
    }

    #[test]
    fn blocks_come_in_order_until_one_ends_them() {
        let ahead = [3_u8; 200];
        for is_around in [false, true] {
            let mut target = vec![0_u8; 1000];
            Out::new(&mut target, is_around).blocks(300, |index, block| {
                block.fill(index as u8 + 1);
                Some([&ahead, &ahead[..64], &[]])
            });
            let expected: Vec<u8> = (0..1000).map(|at| (at / 300 + 1) as u8).collect();
            assert_eq!(target, expected);
            let mut count = 0;
            Out::new(&mut target, is_around).blocks(300, |index, _| {
                count += 1;
                (index < 1).then_some(NOTHING)
            });
            assert_eq!(count, 2);
        }
    }

    #[test]
    fn a_tile_is_transposed_whatever_its_elements_are() {
        fn check<const SIZE: usize>() {
            let source: Vec<u8> = (0..64 * 67).map(|index: usize| (index * 31 + index / 251) as u8).collect();
            let (mut tile, mut expected) = (Tile::new(), Tile::new());
            tile.transpose::<SIZE>(&source[1..], 66);
            transpose_by_elements::<SIZE>(&source[1..], 66, &mut expected.0);
            let side = LINE / SIZE;
            assert_eq!(tile.0[..side], expected.0[..side], "{SIZE}");
            assert_eq!(expected.0[1][..SIZE], source[1 + SIZE..][..SIZE]);
        }
        check::<1>();
        check::<2>();
        check::<4>();
        check::<8>();
        check::<16>();
    }
}
