use super::*;
use crate::testing::Random;

fn contiguous(shape: &[usize]) -> Layout {
    Layout::contiguous(DType::F32, shape).unwrap()
}

/// The element offsets in row-major order, by plain enumeration of the indices.
fn offsets(layout: &Layout) -> Vec<usize> {
    let mut all = vec![layout.offset()];
    for (size, stride) in layout.shape().iter().zip(layout.strides()) {
        let along = |start: usize| (0..*size).map(move |index| start + index * *stride as usize);
        all = all.into_iter().flat_map(along).collect();
    }
    all
}

/// The same by the runs that copies use.
fn run_offsets(layout: &Layout) -> Vec<usize> {
    let size = layout.dtype().size_bytes();
    let runs = layout.runs();
    let (count, step) = (runs.count, runs.step);
    runs.flat_map(|start| (0..count).map(move |index| (start + index * step) / size)).collect()
}

#[test]
fn a_contiguous_layout_counts_row_by_row() {
    let layout = contiguous(&[2, 3, 4]);
    assert_eq!((layout.strides(), layout.numel(), layout.size_bytes()), (&[12, 4, 1][..], 24, 96));
    assert_eq!(layout.byte_span(), 0..96);
    let scalar = contiguous(&[]);
    assert_eq!((scalar.rank(), scalar.numel(), scalar.byte_span()), (0, 1, 0..4));
    let empty = contiguous(&[3, 0]);
    assert_eq!((empty.numel(), empty.byte_span(), empty.is_contiguous()), (0, 0..0, true));
}

#[test]
fn views_of_a_matrix_by_hand() {
    // 0 1 2
    // 3 4 5
    let matrix = contiguous(&[2, 3]);
    assert_eq!(offsets(&matrix.transpose(0, 1).unwrap()), [0, 3, 1, 4, 2, 5]);
    assert_eq!(offsets(&matrix.narrow(1, 1, 2).unwrap()), [1, 2, 4, 5]);
    assert_eq!(matrix.narrow(1, 1, 2).unwrap().byte_span(), 4..24);
    assert_eq!(offsets(&matrix.select(0, 1).unwrap()), [3, 4, 5]);
    assert_eq!(offsets(&matrix.select(1, 2).unwrap()), [2, 5]);
    assert_eq!(offsets(&matrix.select(1, 2).unwrap().broadcast_to(&[2, 2]).unwrap()), [2, 5, 2, 5]);
    assert_eq!(matrix.unsqueeze(1).unwrap().shape(), [2, 1, 3]);
    assert_eq!(matrix.unsqueeze(2).unwrap().squeeze(2).unwrap(), matrix);
    assert_eq!(matrix.reshape(&[3, 2]).unwrap(), contiguous(&[3, 2]));
    assert_eq!(matrix.narrow(0, 2, 0).unwrap().byte_span(), 0..0, "no elements, whatever the offset");
}

/// Which sizes are possible does not depend on how the strides are given: what one side makes, the other must read.
#[test]
fn sizes_beside_a_zero_are_alike_with_and_without_strides() {
    let huge = isize::MAX as usize;
    let empty = Layout::contiguous(DType::F64, &[0, huge, huge]).unwrap();
    assert_eq!((empty.numel(), empty.byte_span(), empty.strides()[1..].to_vec()), (0, 0..0, vec![i64::MAX, 1]));
    assert_eq!(contiguous(&[0, 1, 1]).broadcast_to(&[0, huge, huge]).unwrap().shape(), empty.shape());
    assert_eq!(empty.reshape(&[huge, 0]).unwrap().shape(), [huge, 0]);
    // No signed number on the wire could say it.
    assert_eq!(Layout::contiguous(DType::U8, &[0, huge + 1]), Err(LayoutError::Overflow));
    assert_eq!(Layout::strided(DType::U8, &[0, huge + 1], &[0, 0], 0), Err(LayoutError::Overflow));
    assert_eq!(contiguous(&[0, 1]).broadcast_to(&[0, huge + 1]), Err(LayoutError::Overflow));
}

#[test]
fn reshape_needs_a_copy_only_where_strides_cannot_say_it() {
    let transposed = contiguous(&[4, 6]).transpose(0, 1).unwrap();
    assert!(matches!(transposed.reshape(&[24]), Err(LayoutError::NotViewable { .. })));
    assert_eq!(transposed.reshape(&[2, 3, 1, 4]).unwrap().strides()[..2], [3, 1], "splitting a dimension is a view");
    let rows = contiguous(&[4, 6]).narrow(1, 0, 3).unwrap();
    assert!(matches!(rows.reshape(&[12]), Err(LayoutError::NotViewable { .. })));
    assert_eq!(rows.reshape(&[2, 2, 3]).unwrap().strides(), [12, 6, 1]);
    assert!(matches!(rows.reshape(&[13]), Err(LayoutError::ShapeMismatch { .. })));
    assert_eq!(contiguous(&[0, 3]).reshape(&[7, 0]).unwrap().shape(), [7, 0]);
}

#[test]
fn wrong_arguments_have_their_errors() {
    let matrix = contiguous(&[2, 3]);
    let rank = 2;
    assert_eq!(matrix.select(2, 0), Err(LayoutError::NoSuchDimension { dim: 2, rank }));
    assert_eq!(matrix.transpose(0, 5), Err(LayoutError::NoSuchDimension { dim: 5, rank }));
    assert_eq!(matrix.unsqueeze(3), Err(LayoutError::NoSuchDimension { dim: 3, rank }));
    assert_eq!(matrix.narrow(1, 2, 2), Err(LayoutError::IndexOutOfRange { dim: 1, start: 2, end: 4, size: 3 }));
    assert_eq!(
        matrix.narrow(1, 1, usize::MAX),
        Err(LayoutError::IndexOutOfRange { dim: 1, start: 1, end: usize::MAX, size: 3 })
    );
    assert_eq!(matrix.select(0, 2), Err(LayoutError::IndexOutOfRange { dim: 0, start: 2, end: 3, size: 2 }));
    for dims in [&[0][..], &[0, 0], &[0, 2], &[0, 1, 1]] {
        assert_eq!(matrix.permute(dims), Err(LayoutError::NotAPermutation { dims: dims.to_vec(), rank }));
    }
    assert!(matches!(matrix.squeeze(0), Err(LayoutError::ShapeMismatch { .. })));
    assert!(matches!(matrix.broadcast_to(&[3]), Err(LayoutError::ShapeMismatch { .. })));
    assert!(matches!(matrix.broadcast_to(&[4, 3]), Err(LayoutError::ShapeMismatch { .. })));
    assert_eq!(Layout::strided(DType::U8, &[2], &[], 0), Err(LayoutError::StrideCount { rank: 1, strides: 0 }));
    assert_eq!(
        Layout::strided(DType::U8, &[2], &[-1], 1),
        Err(LayoutError::NegativeDimension { what: "stride", value: -1 })
    );
    assert_eq!(
        Layout::from_signed(DType::U8, &[-2], &[1], 0),
        Err(LayoutError::NegativeDimension { what: "size", value: -2 })
    );
    assert_eq!(
        Layout::from_signed(DType::U8, &[2], &[1], -3),
        Err(LayoutError::NegativeDimension { what: "offset", value: -3 })
    );
}

#[test]
fn l1_what_does_not_fit_the_address_space_is_an_overflow() {
    let huge = 1_usize << 62;
    for (shape, strides, offset) in [
        (&[huge][..], &[1][..], 0),
        (&[huge, huge], &[1, 1], 0),
        (&[2], &[i64::MAX], 0),
        (&[2, 2], &[i64::MAX / 4, i64::MAX / 4], 0),
        (&[huge], &[0], 0),
        (&[1], &[1], usize::MAX),
        (&[1], &[1], isize::MAX as usize / 4),
    ] {
        assert_eq!(Layout::strided(DType::F32, shape, strides, offset), Err(LayoutError::Overflow), "{shape:?}");
    }
    assert_eq!(Layout::contiguous(DType::U8, &[usize::MAX, 2]), Err(LayoutError::Overflow));
    assert_eq!(contiguous(&[1, 1]).broadcast_to(&[huge, 4]), Err(LayoutError::Overflow));
    let too_many = [1; MAX_RANK + 1];
    assert_eq!(Layout::contiguous(DType::U8, &too_many), Err(LayoutError::RankTooLarge { rank: 17 }));
    assert_eq!(Layout::from_signed(DType::U8, &[1; 17], &[1; 17], 0), Err(LayoutError::RankTooLarge { rank: 17 }));
    assert_eq!(contiguous(&[1; MAX_RANK]).unsqueeze(0), Err(LayoutError::RankTooLarge { rank: 17 }));
}

#[test]
fn l1_extreme_numbers_in_dimensions_that_do_not_matter_do_no_harm() {
    // Strides of sizes 0 and 1 are never stepped; every method must survive them.
    let unused = Layout::strided(DType::U8, &[1, 2, 1], &[i64::MAX, 1, i64::MAX], 0).unwrap();
    assert!(unused.is_contiguous() && unused.is_dense());
    assert_eq!(run_offsets(&unused), [0, 1]);
    assert_eq!(unused.reshape(&[2]).unwrap().strides(), [1]);
    assert!(unused.unsqueeze(1).is_ok());
    let far = Layout::strided(DType::U8, &[2, 2], &[1 << 62, 1], 0).unwrap();
    assert_eq!((far.is_contiguous(), far.is_dense(), far.byte_span().end), (false, false, (1 << 62) + 2));
    assert_eq!(far.reshape(&[2, 1, 2, 1]).unwrap().strides()[2], 1);
    let empty = Layout::strided(DType::C128, &[0, isize::MAX as usize], &[i64::MAX, i64::MAX], 5).unwrap();
    assert_eq!((empty.numel(), empty.size_bytes(), run_offsets(&empty).len()), (0, 0, 0));
    assert!(empty.is_dense() && empty.is_dense_or_broadcast() && empty.fits(0).is_ok());
    assert_eq!(empty.packed().numel(), 0);
    assert_eq!(empty.coalesced().numel(), 0);
    assert_eq!(empty.transpose(0, 1).unwrap().narrow(0, 7, 1).unwrap().select(0, 0).unwrap().numel(), 0);
    assert_eq!(empty.unsqueeze(1).unwrap().squeeze(1).unwrap(), empty);
}

#[test]
fn fits_compares_the_span_with_the_storage() {
    let layout = contiguous(&[2, 3]).narrow(1, 2, 1).unwrap();
    assert_eq!(layout.byte_span(), 8..24);
    assert_eq!(layout.fits(24), Ok(()));
    assert_eq!(layout.fits(23), Err(LayoutError::OutOfBounds { end_bytes: 24, storage_bytes: 23 }));
}

#[test]
fn dense_and_broadcast_by_hand() {
    let matrix = contiguous(&[2, 3]);
    let is = |layout: Layout| (layout.is_contiguous(), layout.is_dense(), layout.is_dense_or_broadcast());
    assert_eq!(is(matrix.clone()), (true, true, true));
    assert_eq!(is(matrix.transpose(0, 1).unwrap()), (false, true, true));
    assert_eq!(is(matrix.narrow(1, 0, 2).unwrap()), (false, false, false));
    assert_eq!(is(matrix.unsqueeze(0).unwrap().broadcast_to(&[4, 2, 3]).unwrap()), (false, false, true));
    assert_eq!(is(Layout::strided(DType::U8, &[2, 2], &[1, 1], 0).unwrap()), (false, false, false));
}

/// A layout by a random chain of views, with a plain list of offsets that was kept beside it.
fn random_view(random: &mut Random) -> (Layout, Vec<usize>) {
    let shape: Vec<usize> = (0..random.below(5)).map(|_| random.below(4) + usize::from(random.below(8) > 0)).collect();
    let dtype = DType::ALL[random.below(DType::ALL.len())];
    let mut layout = Layout::contiguous(dtype, &shape).unwrap();
    for _ in 0..random.below(5) {
        let rank = layout.rank();
        let view = match random.below(7) {
            0 if rank > 0 => {
                let dim = random.below(rank);
                let start = random.below(layout.shape()[dim] + 1);
                layout.narrow(dim, start, random.below(layout.shape()[dim] - start + 1))
            }
            1 if rank > 0 => {
                let dim = random.below(rank);
                match layout.shape()[dim] {
                    0 => continue,
                    size => layout.select(dim, random.below(size)),
                }
            }
            2 if rank > 0 => layout.transpose(random.below(rank), random.below(rank)),
            3 => {
                let mut dims: Vec<usize> = (0..rank).collect();
                dims.rotate_left(if rank > 0 { random.below(rank) } else { 0 });
                layout.permute(&dims)
            }
            4 => layout.unsqueeze(random.below(rank + 1)),
            5 => {
                let mut shape = layout.shape().to_vec();
                for size in shape.iter_mut().filter(|size| **size == 1) {
                    *size = random.below(4);
                }
                shape.insert(0, random.below(3));
                layout.broadcast_to(&shape)
            }
            _ => {
                let numel = layout.numel();
                let divisor = (1..=numel.max(1))
                    .filter(|divisor| numel.is_multiple_of(*divisor))
                    .nth(random.below(3))
                    .unwrap_or(1);
                layout.reshape(&[numel / divisor, divisor]).or_else(|_| layout.reshape(layout.shape()))
            }
        };
        let view = view.unwrap_or_else(|error| panic!("{layout:?}: {error}"));
        if view.rank() < 8 && view.numel() <= 4096 {
            layout = view;
        }
    }
    let offsets = offsets(&layout);
    (layout, offsets)
}

#[test]
fn l2_random_views_agree_with_plain_enumeration() {
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let (layout, offsets) = random_view(&mut random);
        let size = layout.dtype().size_bytes();
        assert_eq!(layout.numel(), offsets.len(), "seed {seed}: {layout:?}");
        assert_eq!(run_offsets(&layout), offsets, "seed {seed}: {layout:?}");
        assert_eq!(self::offsets(&layout.coalesced()), offsets, "seed {seed}: {layout:?}");
        let span = match (offsets.iter().min(), offsets.iter().max()) {
            (Some(first), Some(last)) => first * size..(last + 1) * size,
            _ => 0..0,
        };
        assert_eq!(layout.byte_span(), span, "seed {seed}: {layout:?}");
        // Contiguous: the offsets count up by one. Dense: the same, once sorted.
        let counts_up = |offsets: &[usize]| offsets.windows(2).all(|pair| pair[1] == pair[0] + 1);
        assert_eq!(layout.is_contiguous(), counts_up(&offsets), "seed {seed}: {layout:?}");
        let mut sorted = offsets.clone();
        sorted.sort_unstable();
        assert_eq!(layout.is_dense(), counts_up(&sorted), "seed {seed}: {layout:?}");
        // Dense apart from repetition: each offset in the span occurs, all equally often, by strides of 0.
        let mut distinct = sorted.clone();
        distinct.dedup();
        let overlap =
            layout.dims().filter(|(size, stride)| *size > 1 && *stride != 0).map(|(size, _)| size).product::<usize>();
        let expected = offsets.is_empty() || (counts_up(&distinct) && distinct.len() == overlap);
        assert_eq!(layout.is_dense_or_broadcast(), expected, "seed {seed}: {layout:?}");
        let packed = layout.packed();
        assert!(packed.is_contiguous() && packed.shape() == layout.shape() && packed.offset() == 0);
    }
}

#[test]
fn l2_a_reshape_keeps_the_order_or_is_refused_for_a_reason() {
    let mut viewed = 0;
    for seed in 0..4000 {
        let mut random = Random::new(seed ^ 0xabcd);
        let (layout, offsets) = random_view(&mut random);
        // A random factorisation of the element count.
        let mut left = layout.numel();
        let mut shape = Vec::new();
        while left > 1 && shape.len() < 5 {
            let divisors: Vec<usize> = (1..=left).filter(|divisor| left.is_multiple_of(*divisor)).collect();
            shape.push(divisors[random.below(divisors.len())]);
            left /= shape[shape.len() - 1];
        }
        shape.push(left);
        match layout.reshape(&shape) {
            Ok(view) => {
                viewed += 1;
                assert_eq!(self::offsets(&view), offsets, "seed {seed}: {layout:?} as {shape:?}");
            }
            Err(LayoutError::NotViewable { .. }) => {
                // Refused rightly: no strides reproduce the order. They would have to be the steps seen along each dimension.
                let mut inner = offsets.len();
                let steps: Vec<i64> = shape
                    .iter()
                    .map(|size| {
                        inner /= size;
                        if *size > 1 { offsets[inner] as i64 - offsets[0] as i64 } else { 0 }
                    })
                    .collect();
                let expressible = steps.iter().all(|step| *step >= 0)
                    && self::offsets(&Layout::strided(layout.dtype(), &shape, &steps, offsets[0]).unwrap()) == offsets;
                assert!(!expressible, "seed {seed}: {layout:?} as {shape:?} is a view");
            }
            Err(other) => panic!("seed {seed}: {layout:?} as {shape:?}: {other}"),
        }
    }
    assert!(viewed > 1000, "{viewed}");
}
