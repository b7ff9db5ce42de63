//! Serde's serializer: postcard's bytes, with tensors beside them.

use std::any::Any;

use serde::{Serialize, ser};

use super::{CodecError, MAX_DEPTH, MAX_EMPTY_ELEMENTS};
use crate::Tensor;

/// Appends one value to a caller's buffers.
pub(super) struct Encoder<'a> {
    bytes: &'a mut Vec<u8>,
    tensors: &'a mut Vec<Tensor>,
    /// Tensors in the list before this value's.
    tensors_before: usize,
    depth: usize,
    empty_elements: usize,
    context: &'a mut dyn Any,
}

impl<'a> Encoder<'a> {
    #[inline]
    pub(super) fn new(bytes: &'a mut Vec<u8>, tensors: &'a mut Vec<Tensor>, context: &'a mut dyn Any) -> Self {
        let tensors_before = tensors.len();
        Self { bytes, tensors, tensors_before, depth: 0, empty_elements: 0, context }
    }

    /// Lists the tensor and returns its index; `None` if no index is left.
    pub(super) fn push_tensor(&mut self, tensor: &Tensor) -> Option<u32> {
        let index = u32::try_from(self.tensors.len() - self.tensors_before).ok().filter(|index| *index < u32::MAX)?;
        self.tensors.push(tensor.clone());
        Some(index)
    }

    pub(super) fn context(&mut self) -> &mut dyn Any {
        self.context
    }

    #[inline]
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn varint_u128(&mut self, mut value: u128) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn length(&mut self, len: Option<usize>) -> Result<(), CodecError> {
        self.varint(len.ok_or(CodecError::UnknownLength)? as u64);
        Ok(())
    }

    fn enter(&mut self) -> Result<&mut Self, CodecError> {
        if self.depth == MAX_DEPTH {
            return Err(CodecError::TooDeep);
        }
        self.depth += 1;
        Ok(self)
    }

    fn nested<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), CodecError> {
        value.serialize(&mut *self.enter()?)?;
        self.leave();
        Ok(())
    }

    fn leave(&mut self) {
        self.depth -= 1;
    }

    /// Counts an element or entry that took no bytes since `before`.
    fn count_empty(&mut self, before: usize) -> Result<(), CodecError> {
        if self.bytes.len() == before {
            self.empty_elements += 1;
            if self.empty_elements > MAX_EMPTY_ELEMENTS {
                return Err(CodecError::TooManyEmptyElements);
            }
        }
        Ok(())
    }
}

/// Zigzag: small numbers of either sign become small unsigned ones.
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

impl<'e, 'a> ser::Serializer for &'e mut Encoder<'a> {
    type Ok = ();
    type Error = CodecError;
    type SerializeSeq = Sequence<'e, 'a>;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Sequence<'e, 'a>;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    fn is_human_readable(&self) -> bool {
        false
    }

    fn serialize_bool(self, value: bool) -> Result<(), CodecError> {
        self.serialize_u8(u8::from(value))
    }

    fn serialize_i8(self, value: i8) -> Result<(), CodecError> {
        self.serialize_u8(value as u8)
    }

    fn serialize_i16(self, value: i16) -> Result<(), CodecError> {
        self.serialize_i64(value.into())
    }

    fn serialize_i32(self, value: i32) -> Result<(), CodecError> {
        self.serialize_i64(value.into())
    }

    fn serialize_i64(self, value: i64) -> Result<(), CodecError> {
        self.varint(zigzag(value));
        Ok(())
    }

    fn serialize_i128(self, value: i128) -> Result<(), CodecError> {
        self.varint_u128(((value << 1) ^ (value >> 127)) as u128);
        Ok(())
    }

    fn serialize_u8(self, value: u8) -> Result<(), CodecError> {
        self.bytes.push(value);
        Ok(())
    }

    fn serialize_u16(self, value: u16) -> Result<(), CodecError> {
        self.serialize_u64(value.into())
    }

    fn serialize_u32(self, value: u32) -> Result<(), CodecError> {
        self.serialize_u64(value.into())
    }

    fn serialize_u64(self, value: u64) -> Result<(), CodecError> {
        self.varint(value);
        Ok(())
    }

    fn serialize_u128(self, value: u128) -> Result<(), CodecError> {
        self.varint_u128(value);
        Ok(())
    }

    fn serialize_f32(self, value: f32) -> Result<(), CodecError> {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn serialize_f64(self, value: f64) -> Result<(), CodecError> {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn serialize_char(self, value: char) -> Result<(), CodecError> {
        self.serialize_str(value.encode_utf8(&mut [0; 4]))
    }

    fn serialize_str(self, value: &str) -> Result<(), CodecError> {
        self.serialize_bytes(value.as_bytes())
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<(), CodecError> {
        self.varint(value.len() as u64);
        self.bytes.extend_from_slice(value);
        Ok(())
    }

    fn serialize_none(self) -> Result<(), CodecError> {
        self.serialize_u8(0)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), CodecError> {
        self.bytes.push(1);
        self.nested(value)
    }

    fn serialize_unit(self) -> Result<(), CodecError> {
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), CodecError> {
        Ok(())
    }

    fn serialize_unit_variant(self, _: &'static str, index: u32, _: &'static str) -> Result<(), CodecError> {
        self.serialize_u32(index)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), CodecError> {
        self.nested(value)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
        value: &T,
    ) -> Result<(), CodecError> {
        self.varint(index.into());
        self.nested(value)
    }

    fn serialize_seq(self, len: Option<usize>) -> Result<Sequence<'e, 'a>, CodecError> {
        self.length(len)?;
        Ok(Sequence { encoder: self.enter()?, entry_start: 0 })
    }

    fn serialize_tuple(self, _: usize) -> Result<Self, CodecError> {
        self.enter()
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self, CodecError> {
        self.enter()
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self, CodecError> {
        self.varint(index.into());
        self.enter()
    }

    fn serialize_map(self, len: Option<usize>) -> Result<Sequence<'e, 'a>, CodecError> {
        self.serialize_seq(len)
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self, CodecError> {
        self.enter()
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        index: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self, CodecError> {
        self.varint(index.into());
        self.enter()
    }
}

/// A sequence or map: its elements are counted if they take no bytes, since the length alone tells how many there are.
pub(super) struct Sequence<'e, 'a> {
    encoder: &'e mut Encoder<'a>,
    /// Where the current map entry starts.
    entry_start: usize,
}

impl ser::SerializeSeq for Sequence<'_, '_> {
    type Ok = ();
    type Error = CodecError;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), CodecError> {
        let before = self.encoder.bytes.len();
        value.serialize(&mut *self.encoder)?;
        self.encoder.count_empty(before)
    }

    fn end(self) -> Result<(), CodecError> {
        self.encoder.leave();
        Ok(())
    }
}

impl ser::SerializeMap for Sequence<'_, '_> {
    type Ok = ();
    type Error = CodecError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), CodecError> {
        self.entry_start = self.encoder.bytes.len();
        key.serialize(&mut *self.encoder)
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), CodecError> {
        value.serialize(&mut *self.encoder)?;
        self.encoder.count_empty(self.entry_start)
    }

    fn end(self) -> Result<(), CodecError> {
        self.encoder.leave();
        Ok(())
    }
}

/// Tuples and structs: the type tells how many fields follow.
macro_rules! fields {
    ($($trait:ident $method:ident ($($key:ty)?)),*) => {$(
        impl ser::$trait for &mut Encoder<'_> {
            type Ok = ();
            type Error = CodecError;

            fn $method<T: Serialize + ?Sized>(&mut self, $(_: $key,)? value: &T) -> Result<(), CodecError> {
                value.serialize(&mut **self)
            }

            fn end(self) -> Result<(), CodecError> {
                self.leave();
                Ok(())
            }
        }
    )*};
}

fields! {
    SerializeTuple serialize_element (),
    SerializeTupleStruct serialize_field (),
    SerializeTupleVariant serialize_field (),
    SerializeStruct serialize_field (&'static str),
    SerializeStructVariant serialize_field (&'static str)
}
