//! What the operators give: beside torch's recorded results, beside finite differences, and on every kind of stream.
#![expect(clippy::unwrap_used, reason = "a failure here is the test's own")]

#[path = "suite/gradients.rs"]
mod gradients;
#[path = "suite/recorded.rs"]
mod recorded;
#[path = "suite/streams.rs"]
mod streams;

use std::time::Duration;

use farcall_device::{DType, Device, Runtime, Stream, Tensor};

/// No test waits longer.
const LONG: Duration = Duration::from_secs(60);

fn host() -> Stream {
    Runtime::global().stream(Device::HOST).expect("the host")
}

/// The elements of a tensor of any real, integer or truth dtype, each as exactly as an `f64` can hold it.
fn numbers(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.host().wait(LONG).expect("a host copy");
    macro_rules! as_f64 {
        ($($dtype:ident: $type:ty, |$x:ident| $number:expr;)*) => {
            match tensor.dtype() {
                $(DType::$dtype => tensor.to_vec::<$type>().expect("elements").into_iter().map(|$x| $number).collect(),)*
                other => panic!("{other} is compared by its bits"),
            }
        };
    }
    as_f64! {
        Bool: bool, |x| f64::from(u8::from(x));
        U8: u8, |x| x.into();
        I8: i8, |x| x.into();
        U16: u16, |x| x.into();
        I16: i16, |x| x.into();
        U32: u32, |x| x.into();
        I32: i32, |x| x.into();
        U64: u64, |x| x as f64;
        I64: i64, |x| x as f64;
        F16: farcall_device::f16, |x| x.to_f64();
        BF16: farcall_device::bf16, |x| x.to_f64();
        F32: f32, |x| x.into();
        F64: f64, |x| x;
    }
}
