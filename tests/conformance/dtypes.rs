//! Every dtype travels bit for bit.

use farcall::DType;

use crate::functions::{echo, echo_async, echo_inline, echo_later};
use crate::harness::{Group, bounded, bytes_of, step, tensor_of};

/// Code, bytes and name, written out: a dtype that is added must be added here too.
const DTYPES: [(u8, usize, &str); 17] = [
    (0, 1, "bool"),
    (1, 1, "u8"),
    (2, 1, "i8"),
    (3, 2, "u16"),
    (4, 2, "i16"),
    (5, 4, "u32"),
    (6, 4, "i32"),
    (7, 8, "u64"),
    (8, 8, "i64"),
    (9, 2, "f16"),
    (10, 2, "bf16"),
    (11, 4, "f32"),
    (12, 8, "f64"),
    (13, 1, "f8e4m3"),
    (14, 1, "f8e5m2"),
    (15, 8, "c64"),
    (16, 16, "c128"),
];

#[test]
fn every_dtype_comes_back_bit_for_bit() {
    bounded(|| {
        assert_eq!(DType::ALL.len(), DTYPES.len());
        let group = Group::new(2);
        let w1 = group.agents[0].to("w1");
        for (code, size, name) in DTYPES {
            step(name);
            let dtype = DType::from_code(code).expect("a known code");
            assert_eq!((dtype.name(), dtype.size_bytes()), (name, size));
            // Every byte value, so NaNs of all kinds, negative zeros and denormals; for bool its two.
            let bytes: Vec<u8> =
                (0..256 * size).map(|index| if code == 0 { index as u8 % 2 } else { (index * 7) as u8 }).collect();
            let x = tensor_of(dtype, &[16, 16], &bytes);
            for y in [
                w1.call(echo, (&x,)).wait(),
                w1.call(echo_inline, (&x,)).wait(),
                w1.call(echo_async, (&x,)).wait(),
                w1.call(echo_later, (&x,)).wait(),
            ] {
                let y = y.expect("an echo");
                assert_eq!((y.dtype(), y.shape()), (dtype, &[16, 16][..]));
                assert_eq!(bytes_of(&y), bytes, "{name}");
            }
        }
        group.shutdown();
    });
}
