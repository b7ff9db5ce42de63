//! Tensor descriptors, one behind the other as in a frame's table.

use farcall_device::{DType, Device, Layout};

use super::{Golden, limits};
use crate::descriptor::{Descriptor, Lent, MAX_BYTES, Mode, Place};

/// Every descriptor read is within its limits, and is read again from what is written of it.
pub fn descriptors(input: &[u8]) -> bool {
    let mut table = input;
    while !table.is_empty() {
        let before = table.len();
        let Ok(descriptor) = Descriptor::read(&mut table, &limits()) else { return false };
        assert!((48..=MAX_BYTES as usize).contains(&(before - table.len())), "{descriptor:?}");
        check(&descriptor);
    }
    !input.is_empty()
}

fn check(descriptor: &Descriptor) {
    let layout = &descriptor.layout;
    assert!(descriptor.len_bytes <= limits().tensor_bytes_max, "{descriptor:?}");
    assert!(layout.size_bytes() as u64 <= limits().tensor_bytes_max, "{descriptor:?}");
    // Its bytes hold every element, and no byte that is none.
    assert_eq!(layout.byte_span(), 0..descriptor.len_bytes as usize, "{descriptor:?}");
    assert!(layout.is_dense_or_broadcast(), "{descriptor:?}");
    assert_eq!(descriptor.len_bytes == 0, layout.numel() == 0, "{descriptor:?}");
    assert!(descriptor.len_bytes > 0 || descriptor.mode == Mode::Inline, "{descriptor:?}: nothing to wait for");

    let mut written = Vec::new();
    descriptor.write(&mut written);
    let again = Descriptor::read(&mut &written[..], &limits());
    let again = again.unwrap_or_else(|error| panic!("{descriptor:?} is not read back: {error}"));
    assert!(
        is_same_tensor(layout, &again.layout)
            && (descriptor.device, descriptor.mode, descriptor.len_bytes)
                == (again.device, again.mode, again.len_bytes),
        "{descriptor:?} is read back as {again:?}"
    );
    let mut rewritten = Vec::new();
    again.write(&mut rewritten);
    assert_eq!(written, rewritten, "{descriptor:?}");
}

/// Whether each index names the same byte in both. Strides that are never stepped by do not matter, and do not travel.
pub(super) fn is_same_tensor(a: &Layout, b: &Layout) -> bool {
    let stepped = |layout: &Layout| {
        let strides = layout.shape().iter().zip(layout.strides());
        strides.map(|(size, stride)| if *size > 1 { *stride } else { 0 }).collect::<Vec<_>>()
    };
    let same_strides = a.numel() == 0 || stepped(a) == stepped(b);
    a.dtype() == b.dtype() && a.shape() == b.shape() && a.offset() == b.offset() && same_strides
}

/// Every dtype, and layouts of each kind.
pub fn golden() -> Vec<Golden> {
    let wire = |descriptors: &[Descriptor]| {
        let mut table = Vec::new();
        descriptors.iter().for_each(|descriptor| descriptor.write(&mut table));
        table
    };
    let of = |layout: Layout, device, mode| Descriptor {
        len_bytes: layout.byte_span().end as u64,
        layout,
        device,
        mode,
        digests: None,
    };
    let strided =
        |dtype, shape: &[usize], strides: &[i64]| Layout::strided(dtype, shape, strides, 0).expect("a small layout");
    let dense = |dtype, shape: &[usize]| Layout::contiguous(dtype, shape).expect("a small layout");
    let host = |layout| of(layout, Device::HOST, Mode::Inline);
    let table: Vec<Descriptor> = DType::ALL.map(|dtype| host(dense(dtype, &[3]))).into();
    vec![
        ("every-dtype", wire(&table)),
        ("scalar", wire(&[host(dense(DType::F64, &[]))])),
        ("empty", wire(&[host(dense(DType::F32, &[2, 0, 3]))])),
        ("transposed", wire(&[host(strided(DType::F32, &[3, 2], &[1, 3]))])),
        ("broadcast", wire(&[host(strided(DType::I16, &[4, 5], &[0, 1]))])),
        ("bulk-to-cuda", wire(&[of(dense(DType::BF16, &[64, 64]), Device::Cuda(3), Mode::Bulk(9))])),
        (
            "slab",
            wire(&[of(dense(DType::F32, &[9]), Device::HOST, Mode::Slab(Place { slab: 1, offset: 64, lease: 2 }))]),
        ),
        (
            "landing",
            wire(&[of(dense(DType::U8, &[9]), Device::HOST, Mode::Landing(Place { slab: 3, offset: 64, lease: 2 }))]),
        ),
        ("back", wire(&[of(dense(DType::F32, &[9]), Device::HOST, Mode::Back(Lent { lease: 2, offset: 64 }))])),
        ("rank-16", wire(&[host(dense(DType::U8, &[1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 3]))])),
        (
            "two",
            wire(&[host(dense(DType::C128, &[1, 1])), of(dense(DType::Bool, &[7]), Device::Cuda(0), Mode::Inline)]),
        ),
    ]
}
