//! Serde values with tensors anywhere inside ⇄ metadata bytes, with the tensors beside them.
//!
//! The bytes are postcard's wire format (<https://postcard.jamesmunns.com/wire-format>); a tensor is a `u32` varint, its index in
//! the list. No global and no thread-local state: [`Tensor`]'s `Serialize` and `Deserialize` recognise the encoder and decoder of
//! this module by type, and refuse any other.
//! Invariant C1: decoding never panics, never recurses deeper than [`MAX_DEPTH`] and allocates no more than the input's size
//! warrants, whatever the bytes are. Peers write them.
//! Invariant C2: every byte and every tensor is used; leftovers are errors.
//! Invariant C3: what [`encode`] accepts, [`decode`] gives back equal, for types whose `Serialize` and `Deserialize` agree.
#![expect(
    unsafe_code,
    reason = "names the encoder or decoder behind a generic serde parameter whose type was compared"
)]

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::thread::LocalKey;

use serde::de::{DeserializeOwned, Error as _};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Tensor;

mod decoder;
mod encoder;
mod shape;

use decoder::Decoder;
use encoder::Encoder;
use shape::Tracer;

pub use shape::shape;

/// How deep options, sequences, maps, structs and enums may nest.
pub const MAX_DEPTH: usize = 128;

/// How many elements that take no bytes, such as `()`, one value may hold in its sequences: no input pays for them.
pub const MAX_EMPTY_ELEMENTS: usize = 1 << 16;

/// Why a value could not be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The bytes end within the value.
    #[error("the metadata ends early: {want_bytes} bytes wanted at {at}, {left_bytes} left")]
    Truncated {
        /// Where, from the start.
        at: usize,
        /// Bytes needed there.
        want_bytes: usize,
        /// Bytes left there.
        left_bytes: usize,
    },
    /// The value ends before the bytes do.
    #[error("{count} bytes follow the value")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// The value nests deeper than [`MAX_DEPTH`].
    #[error("the value nests deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// More than [`MAX_EMPTY_ELEMENTS`] elements without bytes.
    #[error("more than {MAX_EMPTY_ELEMENTS} elements that take no bytes")]
    TooManyEmptyElements,
    /// Bytes that are no value of what is expected there.
    #[error("no valid {what} at byte {at}")]
    Invalid {
        /// "bool", "varint", "char", "utf-8" or "option tag".
        what: &'static str,
        /// Where, from the start.
        at: usize,
    },
    /// A tensor's index is past the list.
    #[error("tensor {index} is named, but {count} came along")]
    TensorIndex {
        /// The index in the bytes.
        index: u32,
        /// Tensors in the list.
        count: usize,
    },
    /// A tensor that the value does not name.
    #[error("tensor {index} came along, but the value does not use it")]
    UnusedTensor {
        /// Its index in the list.
        index: usize,
    },
    /// A sequence or map that does not tell its length before its elements, which the format writes first.
    #[error("a sequence or map must tell its length before its elements")]
    UnknownLength,
    /// The type asks the format what comes next; it does not say. `#[serde(flatten)]`, `untagged` and `tag` do this.
    #[error("this type needs a self-describing format: {what} is not possible")]
    NotSelfDescribing {
        /// What was asked of the format.
        what: &'static str,
    },
    /// What the type's own `Serialize` or `Deserialize` reports.
    #[error("{0}")]
    Custom(String),
}

impl serde::ser::Error for CodecError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::Custom(text.to_string())
    }
}

impl serde::de::Error for CodecError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::Custom(text.to_string())
    }
}

/// An encoded value.
#[derive(Debug, Clone, Default)]
pub struct Encoded {
    /// Everything but the tensors.
    pub metadata: Vec<u8>,
    /// The tensors, in the order in which the value names them; one that occurs twice is listed twice.
    pub tensors: Vec<Tensor>,
}

/// Encodes `value`.
///
/// # Errors
/// [`CodecError::TooDeep`] and the other limits; [`CodecError::Custom`] from the type's own `Serialize`.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Encoded, CodecError> {
    let mut encoded = Encoded { metadata: spare_buffer(), tensors: spare_tensors() };
    encode_into(value, &mut encoded.metadata, &mut encoded.tensors)?;
    Ok(encoded)
}

thread_local! {
    /// Buffers that this thread has done with.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static SPARE_TENSORS: RefCell<Vec<Vec<Tensor>>> = const { RefCell::new(Vec::new()) };
}

/// How many small buffers a thread keeps, and how many bytes they may have: a burst of calls allocates once.
const SPARE_MAX: usize = 2048;
const SPARE_BYTES_MAX: usize = 256;
/// The same of lists of tensors, which are larger and fewer at a time.
const SPARE_LISTS_MAX: usize = 64;
const SPARE_TENSORS_MAX: usize = 16;

/// An empty buffer for [`Encoded::metadata`], one of [`recycle`] if there is one.
#[must_use]
pub fn spare_buffer() -> Vec<u8> {
    // A thread that ends has none.
    SPARE.try_with(|spare| spare.try_borrow_mut().ok()?.pop()).ok().flatten().unwrap_or_default()
}

/// An empty list for [`Encoded::tensors`], one of [`recycle_tensors`] if there is one.
#[must_use]
pub fn spare_tensors() -> Vec<Tensor> {
    SPARE_TENSORS.try_with(|spare| spare.try_borrow_mut().ok()?.pop()).ok().flatten().unwrap_or_default()
}

/// Keeps a small buffer for this thread's next [`encode`].
pub fn recycle(mut buffer: Vec<u8>) {
    if buffer.capacity() > 0 && buffer.capacity() <= SPARE_BYTES_MAX {
        buffer.clear();
        keep(&SPARE, buffer, SPARE_MAX);
    }
}

/// Drops the tensors, and keeps a short list for this thread's next [`encode`].
pub fn recycle_tensors(mut tensors: Vec<Tensor>) {
    if tensors.capacity() > 0 && tensors.capacity() <= SPARE_TENSORS_MAX {
        // Their owners may run code of their own: before the lists are borrowed.
        tensors.clear();
        keep(&SPARE_TENSORS, tensors, SPARE_LISTS_MAX);
    }
}

impl Encoded {
    /// [`recycle`]s both parts.
    pub fn recycle(self) {
        recycle(self.metadata);
        recycle_tensors(self.tensors);
    }
}

fn keep<T>(spare: &'static LocalKey<RefCell<Vec<T>>>, value: T, max: usize) {
    let _ = spare.try_with(|spare| {
        if let Ok(mut spare) = spare.try_borrow_mut()
            && spare.len() < max
        {
            spare.push(value);
        }
    });
}

/// Encodes `value` at the end of both buffers, whose memory is reused.
///
/// Indices count from where `tensors` ended, so that the appended parts decode by themselves. After an error the buffers are as
/// they were.
///
/// # Errors
/// As [`encode`].
pub fn encode_into<T: Serialize + ?Sized>(
    value: &T,
    metadata: &mut Vec<u8>,
    tensors: &mut Vec<Tensor>,
) -> Result<(), CodecError> {
    encode_with(value, metadata, tensors, &mut ())
}

/// Encodes as [`encode_into`] does, with a `context` that [`encode_context`] gives to `Serialize` implementations inside.
///
/// # Errors
/// As [`encode`].
pub fn encode_with<T: Serialize + ?Sized>(
    value: &T,
    metadata: &mut Vec<u8>,
    tensors: &mut Vec<Tensor>,
    context: &mut dyn Any,
) -> Result<(), CodecError> {
    let (bytes_before, tensors_before) = (metadata.len(), tensors.len());
    let result = value.serialize(&mut Encoder::new(metadata, tensors, context));
    if result.is_err() {
        metadata.truncate(bytes_before);
        tensors.truncate(tensors_before);
    }
    result
}

/// Decodes a value from all of `metadata` and all of `tensors`.
///
/// # Errors
/// See [`CodecError`]: whatever the bytes are, the answer is a value or an error.
pub fn decode<T: DeserializeOwned>(metadata: &[u8], tensors: &[Tensor]) -> Result<T, CodecError> {
    decode_with(metadata, tensors, &mut ())
}

/// Decodes as [`decode`] does, with a `context` that [`decode_context`] gives to `Deserialize` implementations inside.
///
/// # Errors
/// As [`decode`].
pub fn decode_with<T: DeserializeOwned>(
    metadata: &[u8],
    tensors: &[Tensor],
    context: &mut dyn Any,
) -> Result<T, CodecError> {
    let mut decoder = Decoder::new(metadata, tensors, context);
    let value = T::deserialize(&mut decoder).map_err(|error| decoder.cause_of(error))?;
    decoder.finish()?;
    Ok(value)
}

/// The context of [`encode_with`], for a `Serialize` implementation that puts something beside the bytes, as tensors are.
///
/// `None` if `serializer` is not this module's, or the context is of another type.
pub fn encode_context<S: Serializer, C: Any, R>(serializer: &mut S, f: impl FnOnce(&mut C) -> R) -> Option<R> {
    with_encoder(serializer, |encoder| encoder.context().downcast_mut().map(f)).flatten()
}

/// The context of [`decode_with`], for a `Deserialize` implementation that takes something from beside the bytes.
///
/// `None` if `deserializer` is not this module's, or the context is of another type.
pub fn decode_context<'de, D: Deserializer<'de>, C: Any, R>(
    deserializer: &mut D,
    f: impl FnOnce(&mut C) -> R,
) -> Option<R> {
    with_decoder(deserializer, |decoder| decoder.context().downcast_mut().map(f)).flatten()
}

impl Serialize for Tensor {
    /// Puts the tensor beside the bytes, which get its index. Only this module's encoder can.
    fn serialize<S: Serializer>(&self, mut serializer: S) -> Result<S::Ok, S::Error> {
        match with_encoder(&mut serializer, |encoder| encoder.push_tensor(self)) {
            Some(Some(index)) => serializer.serialize_u32(index),
            Some(None) => Err(S::Error::custom("a value holds at most 2^32 - 1 tensors")),
            None => Err(S::Error::custom("a Tensor can be serialized only by farcall's codec")),
        }
    }
}

impl<'de> Deserialize<'de> for Tensor {
    /// Reads an index and takes that tensor from beside the bytes. Only this module's decoder can.
    fn deserialize<D: Deserializer<'de>>(mut deserializer: D) -> Result<Self, D::Error> {
        let tensor = with_decoder(&mut deserializer, |decoder| decoder.take_tensor())
            .or_else(|| with_tracer(&mut deserializer, |tracer| tracer.tensor()));
        match tensor {
            Some(tensor) => tensor.map_err(D::Error::custom),
            None => Err(D::Error::custom("a Tensor can be deserialized only by farcall's codec")),
        }
    }
}

/// Calls `f` with the encoder, if that is what `serializer` is.
fn with_encoder<S, R>(serializer: &mut S, f: impl for<'a> FnOnce(&mut Encoder<'a>) -> R) -> Option<R> {
    if typeid::of::<S>() != typeid::of::<&mut Encoder<'static>>() {
        return None;
    }
    // SAFETY: equal type ids mean that `S` is `&mut Encoder<'a>` for some lifetimes, so the pointer is to such a reference. The
    // true `'a` cannot be named here; `f` works for every `'a`, so it can neither keep nor store anything that depends on it.
    let encoder = unsafe { &mut *std::ptr::from_mut(serializer).cast::<&mut Encoder<'_>>() };
    Some(f(encoder))
}

/// Calls `f` with the decoder, if that is what `deserializer` is.
fn with_decoder<D, R>(deserializer: &mut D, f: impl for<'a> FnOnce(&mut Decoder<'a>) -> R) -> Option<R> {
    if typeid::of::<D>() != typeid::of::<&mut Decoder<'static>>() {
        return None;
    }
    // SAFETY: as in `with_encoder`.
    let decoder = unsafe { &mut *std::ptr::from_mut(deserializer).cast::<&mut Decoder<'_>>() };
    Some(f(decoder))
}

/// Calls `f` with the tracer, if that is what `deserializer` is.
fn with_tracer<D, R>(deserializer: &mut D, f: impl for<'a> FnOnce(&mut Tracer<'a>) -> R) -> Option<R> {
    if typeid::of::<D>() != typeid::of::<&mut Tracer<'static>>() {
        return None;
    }
    // SAFETY: as in `with_encoder`.
    let tracer = unsafe { &mut *std::ptr::from_mut(deserializer).cast::<&mut Tracer<'_>>() };
    Some(f(tracer))
}

#[cfg(test)]
mod tests;
