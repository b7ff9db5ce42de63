//! Serde's deserializer: postcard's bytes, written by a peer, with tensors beside them.

use std::any::Any;
use std::collections::BTreeSet;
use std::ops::{BitOrAssign, Shl};

use serde::de::value::U32Deserializer;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};

use super::{CodecError, MAX_DEPTH, MAX_EMPTY_ELEMENTS};
use crate::Tensor;

/// Reads one value from bytes and a list of tensors.
pub(super) struct Decoder<'de> {
    bytes: &'de [u8],
    /// Bytes read so far.
    at: usize,
    tensors: &'de [Tensor],
    /// All tensors below this index were used.
    used: usize,
    /// Used ones beyond that; empty as long as the value names its tensors in order, as our encoder writes them.
    used_ahead: Option<BTreeSet<usize>>,
    depth: usize,
    empty_elements: usize,
    /// Elements that the sequences around the current value still expect, as they claim; saturated.
    promised: usize,
    /// The typed error of a tensor, which serde carries as text only.
    cause: Option<CodecError>,
    context: &'de mut dyn Any,
}

impl<'de> Decoder<'de> {
    #[inline]
    pub(super) fn new(bytes: &'de [u8], tensors: &'de [Tensor], context: &'de mut dyn Any) -> Self {
        Self {
            bytes,
            at: 0,
            tensors,
            used: 0,
            used_ahead: None,
            depth: 0,
            empty_elements: 0,
            promised: 0,
            cause: None,
            context,
        }
    }

    /// Reads a tensor's index and takes that tensor.
    pub(super) fn take_tensor(&mut self) -> Result<Tensor, CodecError> {
        let taken = self.varint(32).and_then(|index| {
            let (index, count) = (index as u32, self.tensors.len());
            self.tensors
                .get(index as usize)
                .ok_or(CodecError::TensorIndex { index, count })
                .map(|tensor| (index as usize, tensor))
        });
        let (index, tensor) = taken.inspect_err(|error| self.cause = Some(error.clone()))?;
        if index == self.used {
            self.used += 1;
            while self.used_ahead.as_mut().is_some_and(|ahead| ahead.remove(&self.used)) {
                self.used += 1;
            }
        } else if index > self.used {
            self.used_ahead.get_or_insert_default().insert(index);
        }
        Ok(tensor.clone())
    }

    pub(super) fn context(&mut self) -> &mut dyn Any {
        self.context
    }

    /// The error to report: a tensor's typed one if that is what ended the decoding.
    pub(super) fn cause_of(&mut self, error: CodecError) -> CodecError {
        self.cause.take().unwrap_or(error)
    }

    /// Checks that nothing is left over (C2).
    #[inline]
    pub(super) fn finish(&self) -> Result<(), CodecError> {
        match self.bytes.len() - self.at {
            0 if self.used < self.tensors.len() => Err(CodecError::UnusedTensor { index: self.used }),
            0 => Ok(()),
            count => Err(CodecError::TrailingBytes { count }),
        }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'de [u8], CodecError> {
        let left_bytes = self.left();
        if count > left_bytes {
            return Err(CodecError::Truncated { at: self.at, want_bytes: count, left_bytes });
        }
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8, CodecError> {
        let byte =
            self.bytes.get(self.at).ok_or(CodecError::Truncated { at: self.at, want_bytes: 1, left_bytes: 0 })?;
        self.at += 1;
        Ok(*byte)
    }

    /// A number of at most `bits` bits, 7 a byte, the lowest first.
    #[inline]
    fn varint(&mut self, bits: u32) -> Result<u128, CodecError> {
        match self.bytes.get(self.at) {
            // Most are small.
            Some(byte) if *byte < 0x80 && bits > 7 => {
                self.at += 1;
                Ok(u128::from(*byte))
            }
            _ => self.long_varint(bits),
        }
    }

    fn long_varint(&mut self, bits: u32) -> Result<u128, CodecError> {
        if bits <= 64 { self.digits::<u64>(bits).map(u128::from) } else { self.digits(bits) }
    }

    /// A number of up to `bits` bits, seven in a byte; `N` holds as many.
    fn digits<N: From<u8> + Shl<u32, Output = N> + BitOrAssign>(&mut self, bits: u32) -> Result<N, CodecError> {
        let start = self.at;
        let mut value = N::from(0);
        let mut shift = 0;
        while shift < bits {
            let byte = self.byte()?;
            let digit = byte & 0x7f;
            // The last byte's upper digits would be shifted out.
            if bits - shift < 7 && digit >> (bits - shift) != 0 {
                break;
            }
            value |= N::from(digit) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
            shift += 7;
        }
        Err(CodecError::Invalid { what: "varint", at: start })
    }

    fn zigzag(&mut self, bits: u32) -> Result<i128, CodecError> {
        let value = self.varint(bits)?;
        Ok((value >> 1) as i128 ^ -((value & 1) as i128))
    }

    /// A length. One that memory could not hold ends in `Truncated` when the bytes are taken.
    fn length(&mut self) -> Result<usize, CodecError> {
        self.varint(usize::BITS).map(|length| length as usize)
    }

    fn str(&mut self) -> Result<&'de str, CodecError> {
        let at = self.at;
        let length = self.length()?;
        std::str::from_utf8(self.take(length)?).map_err(|_| CodecError::Invalid { what: "utf-8", at })
    }

    fn enter(&mut self) -> Result<(), CodecError> {
        if self.depth == MAX_DEPTH {
            return Err(CodecError::TooDeep);
        }
        self.depth += 1;
        Ok(())
    }

    /// Runs `f` one level deeper.
    fn nested<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T, CodecError>) -> Result<T, CodecError> {
        self.enter()?;
        let value = f(self)?;
        self.depth -= 1;
        Ok(value)
    }

    fn fields<V: Visitor<'de>>(&mut self, count: usize, visitor: V) -> Result<V::Value, CodecError> {
        self.nested(|decoder| {
            let promised_outside = decoder.promised;
            visitor.visit_seq(Elements { decoder, left: count, counted: false, entry_start: 0, promised_outside })
        })
    }

    /// Reads a length, then as many elements or entries.
    fn counted<T>(&mut self, f: impl FnOnce(Elements<'_, 'de>) -> Result<T, CodecError>) -> Result<T, CodecError> {
        let left = self.length()?;
        self.nested(|decoder| {
            let promised_outside = decoder.promised;
            let value = f(Elements { decoder: &mut *decoder, left, counted: true, entry_start: 0, promised_outside })?;
            decoder.promised = promised_outside;
            Ok(value)
        })
    }

    /// Counts an element or entry that took no bytes since `before` (C1: a length alone must not cost much work).
    fn count_empty(&mut self, before: usize) -> Result<(), CodecError> {
        if self.at == before {
            self.empty_elements += 1;
            if self.empty_elements > MAX_EMPTY_ELEMENTS {
                return Err(CodecError::TooManyEmptyElements);
            }
        }
        Ok(())
    }
}

/// Numbers of a fixed width; a varint of `$bits` fits the type, so the cast loses nothing.
macro_rules! numbers {
    ($($method:ident $visit:ident $type:ty: $read:ident ($($bits:expr)?)),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
            visitor.$visit(self.$read($($bits)?)? as $type)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for &mut Decoder<'de> {
    type Error = CodecError;

    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, CodecError> {
        Err(CodecError::NotSelfDescribing { what: "deserialize_any" })
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let at = self.at;
        match self.byte()? {
            0 => visitor.visit_bool(false),
            1 => visitor.visit_bool(true),
            _ => Err(CodecError::Invalid { what: "bool", at }),
        }
    }

    numbers! {
        deserialize_i8 visit_i8 i8: byte (),
        deserialize_i16 visit_i16 i16: zigzag (16),
        deserialize_i32 visit_i32 i32: zigzag (32),
        deserialize_i64 visit_i64 i64: zigzag (64),
        deserialize_i128 visit_i128 i128: zigzag (128),
        deserialize_u8 visit_u8 u8: byte (),
        deserialize_u16 visit_u16 u16: varint (16),
        deserialize_u32 visit_u32 u32: varint (32),
        deserialize_u64 visit_u64 u64: varint (64),
        deserialize_u128 visit_u128 u128: varint (128),
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        visitor.visit_f32(f32::from_le_bytes(self.array()?))
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        visitor.visit_f64(f64::from_le_bytes(self.array()?))
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let at = self.at;
        let mut chars = self.str()?.chars();
        match (chars.next(), chars.next()) {
            (Some(char), None) => visitor.visit_char(char),
            _ => Err(CodecError::Invalid { what: "char", at }),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        visitor.visit_borrowed_str(self.str()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let length = self.length()?;
        visitor.visit_borrowed_bytes(self.take(length)?)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let at = self.at;
        match self.byte()? {
            0 => visitor.visit_none(),
            1 => self.nested(|decoder| visitor.visit_some(decoder)),
            _ => Err(CodecError::Invalid { what: "option tag", at }),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, CodecError> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, CodecError> {
        self.nested(|decoder| visitor.visit_newtype_struct(decoder))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        self.counted(|elements| visitor.visit_seq(elements))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, CodecError> {
        self.fields(len, visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.fields(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        self.counted(|entries| visitor.visit_map(entries))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.fields(fields.len(), visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        visitor.visit_enum(self)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, _: V) -> Result<V::Value, CodecError> {
        Err(CodecError::NotSelfDescribing { what: "deserialize_identifier" })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, CodecError> {
        Err(CodecError::NotSelfDescribing { what: "deserialize_ignored_any" })
    }
}

/// The elements of a sequence, the entries of a map, or the fields of a tuple or struct.
struct Elements<'d, 'de> {
    decoder: &'d mut Decoder<'de>,
    left: usize,
    /// Whether the number came from the bytes.
    counted: bool,
    /// Where the current map entry starts.
    entry_start: usize,
    /// The decoder's `promised` around this sequence.
    promised_outside: usize,
}

impl Elements<'_, '_> {
    /// What to make room for, whatever length is claimed: no more than the bytes that are left can hold, beside what the
    /// sequences around this one expect. So the rooms of lists in lists never add up to more than the input warrants.
    fn bounded(&self) -> Option<usize> {
        let free = self.decoder.left().saturating_sub(self.promised_outside);
        Some(if self.counted { self.left.min(free) } else { self.left })
    }

    /// Counts an element that is about to be read.
    fn begin(&mut self) {
        self.left -= 1;
        if self.counted {
            self.decoder.promised = self.promised_outside.saturating_add(self.left);
        }
    }
}

impl<'de> de::SeqAccess<'de> for Elements<'_, 'de> {
    type Error = CodecError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, CodecError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.begin();
        let before = self.decoder.at;
        let value = seed.deserialize(&mut *self.decoder)?;
        if self.counted {
            self.decoder.count_empty(before)?;
        }
        Ok(Some(value))
    }

    fn size_hint(&self) -> Option<usize> {
        self.bounded()
    }
}

impl<'de> de::MapAccess<'de> for Elements<'_, 'de> {
    type Error = CodecError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, CodecError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.begin();
        self.entry_start = self.decoder.at;
        seed.deserialize(&mut *self.decoder).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, CodecError> {
        let value = seed.deserialize(&mut *self.decoder)?;
        self.decoder.count_empty(self.entry_start)?;
        Ok(value)
    }

    fn size_hint(&self) -> Option<usize> {
        self.bounded()
    }
}

impl<'de> de::EnumAccess<'de> for &mut Decoder<'de> {
    type Error = CodecError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), CodecError> {
        let index: U32Deserializer<CodecError> = (self.varint(32)? as u32).into_deserializer();
        Ok((seed.deserialize(index)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for &mut Decoder<'de> {
    type Error = CodecError;

    fn unit_variant(self) -> Result<(), CodecError> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, CodecError> {
        self.nested(|decoder| seed.deserialize(decoder))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, CodecError> {
        self.fields(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.fields(fields.len(), visitor)
    }
}
