//! Copies a strided view's elements next to each other: the CPU's pack kernel.
//!
//! Dimensions are coalesced first, so that contiguous rows are copied whole; otherwise elements move one by one.

use crate::{DType, Layout};

/// Copies the elements of `layout` in `source`, in row-major order, to `target`, which has exactly their size.
pub(crate) fn pack(layout: &Layout, source: &[u8], target: &mut [u8]) {
    match layout.dtype().size_bytes() {
        1 => pack_elements::<1>(layout, source, target),
        2 => pack_elements::<2>(layout, source, target),
        4 => pack_elements::<4>(layout, source, target),
        8 => pack_elements::<8>(layout, source, target),
        size => {
            // A literal width lets the compiler copy an element by register; the widest dtype ends the list.
            const WIDEST: usize = DType::C128.size_bytes();
            assert_eq!(size, WIDEST, "no dtype has this size");
            pack_elements::<WIDEST>(layout, source, target);
        }
    }
}

fn pack_elements<const SIZE: usize>(layout: &Layout, source: &[u8], target: &mut [u8]) {
    assert_eq!(target.len(), layout.size_bytes(), "the target was allocated for this layout");
    if target.is_empty() {
        return;
    }
    let runs = layout.runs();
    let (count, step, plain) = (runs.count, runs.step, runs.is_plain(SIZE));
    for (row, start) in target.chunks_exact_mut(count * SIZE).zip(runs) {
        if plain {
            row.copy_from_slice(&source[start..start + row.len()]);
            continue;
        }
        let (elements, _) = row.as_chunks_mut::<SIZE>();
        if step == 0 {
            let repeated: [u8; SIZE] = std::array::from_fn(|byte| source[start + byte]);
            elements.fill(repeated);
            continue;
        }
        // Chunks of one step each hold one element at their front; only the last may end with its element.
        let span = &source[start..start + (count - 1) * step + SIZE];
        for (element, chunk) in elements.iter_mut().zip(span.chunks(step)) {
            element.copy_from_slice(&chunk[..SIZE]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(layout: &Layout, source: &[u8]) -> Vec<u8> {
        let mut target = vec![0xee; layout.size_bytes()];
        pack(layout, source, &mut target);
        target
    }

    #[test]
    fn a_transpose_is_packed_column_by_column() {
        let matrix = Layout::contiguous(DType::U8, &[2, 3]).unwrap();
        assert_eq!(packed(&matrix.transpose(0, 1).unwrap(), &[1, 2, 3, 4, 5, 6]), [1, 4, 2, 5, 3, 6]);
    }

    #[test]
    fn rows_of_a_narrowed_matrix_are_copied_whole() {
        let matrix = Layout::contiguous(DType::U16, &[2, 3]).unwrap().narrow(1, 1, 2).unwrap();
        assert_eq!(packed(&matrix, &[1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]), [2, 0, 3, 0, 5, 0, 6, 0]);
    }

    #[test]
    fn broadcast_elements_are_repeated() {
        let column = Layout::contiguous(DType::U8, &[2, 1]).unwrap().broadcast_to(&[2, 2, 3]).unwrap();
        assert_eq!(packed(&column, &[7, 8]), [7, 7, 7, 8, 8, 8, 7, 7, 7, 8, 8, 8]);
    }

    #[test]
    fn each_element_size_is_copied_whole() {
        for dtype in DType::ALL {
            let size = dtype.size_bytes();
            let source: Vec<u8> = (0..6 * size).map(|byte| byte as u8).collect();
            let every_second = Layout::strided(dtype, &[3], &[2], 0).unwrap();
            let expected: Vec<u8> =
                [0, 2, 4].iter().flat_map(|element| source[element * size..][..size].to_vec()).collect();
            assert_eq!(packed(&every_second, &source), expected, "{dtype}");
        }
    }

    #[test]
    fn no_elements_need_no_source() {
        assert_eq!(packed(&Layout::contiguous(DType::F32, &[0, 4]).unwrap(), &[]), []);
        assert_eq!(packed(&Layout::contiguous(DType::U8, &[]).unwrap(), &[3]), [3], "a scalar has one");
    }
}
