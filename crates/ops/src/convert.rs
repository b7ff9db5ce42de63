//! Casts between all dtypes, a block of elements at a time.
//!
//! A cast is up to three steps over blocks that stay in the cache: decode to a wide dtype, convert between wide ones, encode. The
//! wide dtypes are the integers, `f32` and `f64`; so few loops cover all pairs. As in torch:
//! - to `f16`, `bf16` and 8-bit floats by way of `f32`, rounding to nearest, ties to even; see [`float8`] for what is too large;
//! - reals to integers towards zero. Out of range, where torch's result depends on the machine, they saturate, and NaN becomes 0;
//!   but to `u8` by way of `i64`, so that -1.0 is 255;
//! - complex numbers to reals without their imaginary part; to `bool` whatever is not zero is true, also NaN.

use bytemuck::Pod;
use farcall_device::{C64, C128, DType, bf16};

use crate::kernel::with_vectors;

mod float16;
mod float8;

/// One step over a block: elements of one dtype to as many of another, both aligned.
type Step = fn(&[u8], &mut [u8]);

/// The steps of a cast, and what each gives. None for a dtype to itself.
#[derive(Clone, Copy)]
pub(crate) struct Cast {
    steps: [Option<(Step, DType)>; 3],
}

impl Cast {
    pub(crate) fn between(from: DType, to: DType) -> Self {
        let mut steps = [None; 3];
        let mut count = 0;
        let mut add = |step: Step, gives: DType| {
            steps[count] = Some((step, gives));
            count += 1;
        };
        if let Some(step) = direct(from, to) {
            add(step, to);
        } else if from != to {
            let (wide, target) = (wide(from), wide(to));
            if let Some(step) = decode(from) {
                add(step, wide);
            }
            if to == DType::Bool {
                add(truth(wide), to);
            } else {
                if wide != target {
                    add(convert(wide, target), target);
                }
                if let Some(step) = encode(to) {
                    add(step, to);
                }
            }
        }
        Self { steps }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_none(&self) -> bool {
        self.steps[0].is_none()
    }

    /// Casts a block. `scratch` holds what lies between the steps.
    pub(crate) fn run(&self, source: &[u8], target: &mut [u8], scratch: &mut [Buffer; 2], len: usize) {
        let [first, second] = scratch;
        match self.steps {
            [None, ..] => target.copy_from_slice(source),
            [Some((one, _)), None, _] => one(source, target),
            [Some((one, a)), Some((two, _)), None] => {
                let between = first.bytes(len * a.size_bytes());
                one(source, between);
                two(between, target);
            }
            [Some((one, a)), Some((two, b)), Some((three, _))] => {
                let between = first.bytes(len * a.size_bytes());
                one(source, between);
                let last = second.bytes(len * b.size_bytes());
                two(between, last);
                three(last, target);
            }
        }
    }
}

/// Memory for a block, aligned for every dtype and taken when it is first needed.
#[derive(Default)]
pub(crate) struct Buffer(Vec<u64>);

impl Buffer {
    pub(crate) fn bytes(&mut self, len: usize) -> &mut [u8] {
        let words = len.div_ceil(8);
        if self.0.len() < words {
            self.0.resize(words, 0);
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    pub(crate) fn filled(&self, len: usize) -> &[u8] {
        &bytemuck::cast_slice(&self.0)[..len]
    }
}

/// The wide dtype that a dtype is decoded to and encoded from.
fn wide(dtype: DType) -> DType {
    match dtype {
        DType::Bool => DType::U8,
        DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 | DType::C64 => DType::F32,
        DType::C128 => DType::F64,
        wide => wide,
    }
}

fn map<S: Pod, T: Pod>(source: &[u8], target: &mut [u8], step: impl Fn(S) -> T) {
    let (source, target) = (bytemuck::cast_slice::<u8, S>(source), bytemuck::cast_slice_mut::<u8, T>(target));
    with_vectors(
        #[inline(always)]
        || {
            for (target, source) in target.iter_mut().zip(source) {
                *target = step(*source);
            }
        },
    );
}

/// Casts that do not go by way of a wide dtype.
fn direct(from: DType, to: DType) -> Option<Step> {
    let step: Step = match (from, to) {
        (DType::C64, DType::C128) => |source, target| {
            map(source, target, |c: C64| C128 { re: c.re.into(), im: c.im.into() });
        },
        (DType::C128, DType::C64) => |source, target| {
            map(source, target, |c: C128| C64 { re: c.re as f32, im: c.im as f32 });
        },
        (DType::C64, DType::Bool) => |source, target| {
            map(source, target, |c: C64| u8::from(c.re != 0.0 || c.im != 0.0));
        },
        (DType::C128, DType::Bool) => |source, target| {
            map(source, target, |c: C128| u8::from(c.re != 0.0 || c.im != 0.0));
        },
        _ => return None,
    };
    Some(step)
}

fn decode(from: DType) -> Option<Step> {
    let step: Step = match from {
        DType::Bool => |source, target| map(source, target, |byte: u8| u8::from(byte != 0)),
        DType::F16 => float16::decode,
        DType::BF16 => |source, target| map(source, target, |bits: u16| f32::from_bits(u32::from(bits) << 16)),
        DType::F8E4M3 => |source, target| map(source, target, float8::decode::<{ float8::E4M3 }>),
        DType::F8E5M2 => |source, target| map(source, target, float8::decode::<{ float8::E5M2 }>),
        DType::C64 => |source, target| map(source, target, |c: C64| c.re),
        DType::C128 => |source, target| map(source, target, |c: C128| c.re),
        _ => return None,
    };
    Some(step)
}

fn encode(to: DType) -> Option<Step> {
    let step: Step = match to {
        DType::F16 => float16::encode,
        DType::BF16 => |source, target| map(source, target, bf16_bits),
        DType::F8E4M3 => |source, target| map(source, target, float8::encode::<{ float8::E4M3 }>),
        DType::F8E5M2 => |source, target| map(source, target, float8::encode::<{ float8::E5M2 }>),
        DType::C64 => |source, target| map(source, target, |re: f32| C64 { re, im: 0.0 }),
        DType::C128 => |source, target| map(source, target, |re: f64| C128 { re, im: 0.0 }),
        _ => return None,
    };
    Some(step)
}

/// `bf16::from_f32` without a branch, so that the loop around it uses vectors.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if value.is_nan() { bf16::NAN.to_bits() } else { rounded as u16 }
}

/// What elements of a wide dtype become in another one.
trait To<T> {
    fn to(self) -> T;
}

macro_rules! to {
    ($source:ty: $($target:ty),*) => {$(
        impl To<$target> for $source {
            #[inline(always)]
            fn to(self) -> $target {
                self as $target
            }
        }
    )*};
}

to!(u8: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(i8: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(u16: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(i16: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(u32: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(i32: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(u64: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(i64: u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(f32: i8, u16, i16, u32, i32, u64, i64, f32, f64);
to!(f64: i8, u16, i16, u32, i32, u64, i64, f32, f64);

impl To<u8> for f32 {
    fn to(self) -> u8 {
        self as i64 as u8
    }
}

impl To<u8> for f64 {
    fn to(self) -> u8 {
        self as i64 as u8
    }
}

/// Calls a generic function with the Rust type of a wide dtype.
macro_rules! with_wide {
    ($dtype:expr, $call:ident :: <_ $(, $more:ty)*> ($($argument:expr),*)) => {
        match $dtype {
            DType::U8 => $call::<u8 $(, $more)*>($($argument),*),
            DType::I8 => $call::<i8 $(, $more)*>($($argument),*),
            DType::U16 => $call::<u16 $(, $more)*>($($argument),*),
            DType::I16 => $call::<i16 $(, $more)*>($($argument),*),
            DType::U32 => $call::<u32 $(, $more)*>($($argument),*),
            DType::I32 => $call::<i32 $(, $more)*>($($argument),*),
            DType::U64 => $call::<u64 $(, $more)*>($($argument),*),
            DType::I64 => $call::<i64 $(, $more)*>($($argument),*),
            DType::F32 => $call::<f32 $(, $more)*>($($argument),*),
            DType::F64 => $call::<f64 $(, $more)*>($($argument),*),
            narrow => unreachable!("{narrow} is not wide"),
        }
    };
}

fn convert(from: DType, to: DType) -> Step {
    with_wide!(from, convert_from::<_>(to))
}

fn convert_from<S>(to: DType) -> Step
where
    S: Pod + To<u8> + To<i8> + To<u16> + To<i16> + To<u32> + To<i32> + To<u64> + To<i64> + To<f32> + To<f64>,
{
    fn step<T: Pod, S: Pod + To<T>>() -> Step {
        |source, target| map(source, target, <S as To<T>>::to)
    }
    with_wide!(to, step::<_, S>())
}

fn truth(from: DType) -> Step {
    fn step<S: Pod + PartialEq>() -> Step {
        |source, target| map(source, target, |element: S| u8::from(element != S::zeroed()))
    }
    with_wide!(from, step::<_>())
}

#[cfg(test)]
mod tests {
    use farcall_device::f16;

    use super::*;

    /// Casts a few elements, for tests.
    fn cast<S: farcall_device::Element, T: farcall_device::Element + Pod>(source: &[S]) -> Vec<T> {
        let mut target = vec![T::zeroed(); source.len()];
        let bytes = bytemuck::cast_slice_mut(&mut target);
        let cast = Cast::between(S::DTYPE, T::DTYPE);
        cast.run(bytemuck::cast_slice(source), bytes, &mut Default::default(), source.len());
        target
    }

    #[test]
    fn reals_become_integers_towards_zero_and_saturate() {
        assert_eq!(cast::<f32, i32>(&[1.9, -1.9, 3e9, f32::NAN]), [1, -1, i32::MAX, 0]);
        assert_eq!(cast::<f64, i16>(&[-40000.0, 0.5]), [i16::MIN, 0]);
        assert_eq!(cast::<f32, u8>(&[-1.0, 255.0, 256.0, 3.99]), [255, 255, 0, 3]);
        assert_eq!(cast::<f16, u64>(&[f16::from_f32(-3.0), f16::INFINITY]), [0, u64::MAX]);
    }

    #[test]
    fn integers_wrap_and_truths_are_what_is_not_zero() {
        assert_eq!(cast::<i64, u8>(&[-1, 256, 300]), [255, 0, 44]);
        assert_eq!(cast::<bool, f64>(&[true, false]), [1.0, 0.0]);
        assert_eq!(cast::<C64, u8>(&[C64 { re: 2.5, im: 7.0 }]), [2]);
        let mut truths = [0_u8; 3];
        let cast = Cast::between(DType::C64, DType::Bool);
        let source = [C64 { re: 0.0, im: 1.0 }, C64::default(), C64 { re: f32::NAN, im: 0.0 }];
        cast.run(bytemuck::cast_slice(&source), &mut truths, &mut Default::default(), 3);
        assert_eq!(truths, [1, 0, 1]);
    }

    #[test]
    fn a_cast_has_as_many_steps_as_it_needs() {
        for (from, to, steps) in [
            (DType::F32, DType::F32, 0),
            (DType::F32, DType::BF16, 1),
            (DType::I64, DType::F32, 1),
            (DType::BF16, DType::F16, 2),
            (DType::BF16, DType::C128, 3),
            (DType::F8E4M3, DType::Bool, 2),
        ] {
            let cast = Cast::between(from, to);
            assert_eq!(cast.steps.iter().flatten().count(), steps, "{from} to {to}");
            assert_eq!(cast.is_none(), steps == 0);
        }
    }
}
