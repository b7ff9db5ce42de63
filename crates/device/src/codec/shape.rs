//! What a type's values are made of, as its own `Deserialize` tells: names of fields and variants, and what is in them.
//!
//! Two builds of a program compare these texts before they exchange values, since the bytes name nothing. A made-up value is
//! deserialized, again and again until every variant of every enum was seen.
//! Invariant H1: the text depends on the type's structure and serde's names alone: not on the build, the machine or the path of
//! a type, unless it is opaque.
//! Invariant H2: it ends: recursion is told by name and bounded, and so is the number of values.

use std::fmt::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::de::value::U32Deserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};

use super::CodecError;
use crate::Tensor;

/// How deep made-up values nest, those of recursive types included.
const DEPTH_MAX: usize = 96;
/// How many places all values made up for one type have.
const PLACES_MAX: usize = 1 << 16;
/// How many values are made up for one type.
const VALUES_MAX: usize = 1024;
/// Longer texts are cut, and end with a digest of the rest.
const TEXT_BYTES_MAX: usize = 4 << 10;

/// The structure of `T` as a text, such as `Layer{weight: Tensor, bias: Tensor?}`; a repeated name stands for the same type.
///
/// A type whose `Deserialize` accepts no made-up value is its Rust name.
#[must_use]
pub fn shape<T: DeserializeOwned>() -> String {
    let mut types = Types::default();
    // Another crate's code, on values that nobody has sent.
    let traced = catch_unwind(AssertUnwindSafe(|| trace::<T>(&mut types)));
    match traced {
        Ok(Some(node)) => cut(types.text(&node)),
        _ => cut(std::any::type_name::<T>().to_owned()),
    }
}

fn trace<T: DeserializeOwned>(types: &mut Types) -> Option<Node> {
    for _ in 0..VALUES_MAX {
        let mut tracer = Tracer { types, node: Node::Word("()"), open: Vec::new(), depth: 0 };
        // The value is let go: what it told is in the tracer.
        match T::deserialize(&mut tracer).map(drop) {
            Ok(()) => {
                let node = tracer.node;
                if types.is_complete() {
                    return Some(node);
                }
            }
            // Of a recursive enum, the wrong variant was taken for its smallest.
            Err(CodecError::TooDeep) if std::mem::take(&mut types.retries) => {}
            Err(_) => return None,
        }
    }
    None
}

/// Short texts as they are.
fn cut(text: String) -> String {
    if text.len() <= TEXT_BYTES_MAX {
        return text;
    }
    // FNV-1a.
    let digest = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let end = (0..=TEXT_BYTES_MAX).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    format!("{}… {digest:016x}", &text[..end])
}

/// What was seen of a type.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    Word(&'static str),
    Option(Box<Self>),
    List(Box<Self>),
    Map(Box<Self>, Box<Self>),
    Tuple(Vec<Self>),
    /// By its index among [`Types`].
    Named(usize),
}

/// A type with a name, and what is in it once that is known.
#[derive(Debug)]
struct Named {
    /// Of the visitor: tells types of one name apart, in this process.
    key: &'static str,
    name: &'static str,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// Seen, not yet to its end.
    Unknown,
    Unit,
    Newtype(Node),
    Tuple(Vec<Node>),
    Struct(Vec<(&'static str, Node)>),
    Enum {
        variants: Vec<(&'static str, Option<Self>)>,
        /// How often it was made up.
        seen: usize,
        /// The variant taken within itself: so far, its values seem to end.
        smallest: usize,
    },
}

/// The named types met so far.
#[derive(Debug, Default)]
struct Types {
    all: Vec<Named>,
    /// Places that were made up.
    places: usize,
    /// A value was too deep, and the next may be less so.
    retries: bool,
}

impl Types {
    /// The index of the type with that visitor, known from now on.
    fn index(&mut self, key: &'static str, name: &'static str) -> usize {
        self.all.iter().position(|known| known.key == key).unwrap_or_else(|| {
            self.all.push(Named { key, name, body: Body::Unknown });
            self.all.len() - 1
        })
    }

    fn is_complete(&self) -> bool {
        self.all.iter().all(|named| match &named.body {
            Body::Unknown => false,
            Body::Enum { variants, .. } => variants.iter().all(|(_, body)| body.is_some()),
            _ => true,
        })
    }

    fn text(&self, node: &Node) -> String {
        let mut printer = Printer { types: self, told: vec![false; self.all.len()], text: String::new() };
        printer.node(node);
        printer.text
    }
}

/// Writes each named type once, at its first place.
struct Printer<'a> {
    types: &'a Types,
    told: Vec<bool>,
    text: String,
}

impl Printer<'_> {
    fn node(&mut self, node: &Node) {
        match node {
            Node::Word(word) => self.text.push_str(word),
            Node::Option(of) => {
                self.node(of);
                self.text.push('?');
            }
            Node::List(of) => {
                self.text.push('[');
                self.node(of);
                self.text.push(']');
            }
            Node::Map(key, value) => {
                self.text.push('{');
                self.node(key);
                self.text.push_str(": ");
                self.node(value);
                self.text.push('}');
            }
            Node::Tuple(nodes) => self.tuple(nodes),
            Node::Named(index) => {
                let named = &self.types.all[*index];
                self.text.push_str(named.name);
                if !std::mem::replace(&mut self.told[*index], true) {
                    self.body(&named.body);
                }
            }
        }
    }

    fn tuple(&mut self, nodes: &[Node]) {
        self.text.push('(');
        match nodes {
            [first, rest @ ..] if rest.len() > 2 && rest.iter().all(|node| node == first) => {
                self.node(first);
                let _ = write!(self.text, "; {}", nodes.len());
            }
            _ => self.separated(nodes, ", ", |printer, node| printer.node(node)),
        }
        self.text.push(')');
    }

    fn body(&mut self, body: &Body) {
        match body {
            Body::Unknown | Body::Unit => {}
            Body::Newtype(node) => self.tuple(std::slice::from_ref(node)),
            Body::Tuple(nodes) => self.tuple(nodes),
            Body::Struct(fields) => {
                self.text.push('{');
                self.separated(fields, ", ", |printer, (name, node)| {
                    printer.text.push_str(name);
                    printer.text.push_str(": ");
                    printer.node(node);
                });
                self.text.push('}');
            }
            Body::Enum { variants, .. } => {
                self.text.push('{');
                self.separated(variants, " | ", |printer, (name, body)| {
                    printer.text.push_str(name);
                    printer.body(body.as_ref().unwrap_or(&Body::Unknown));
                });
                self.text.push('}');
            }
        }
    }

    fn separated<T>(&mut self, items: &[T], between: &str, print: impl Fn(&mut Self, &T)) {
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.text.push_str(between);
            }
            print(self, item);
        }
    }
}

/// A deserializer that makes values up, and notes what was asked for.
pub(super) struct Tracer<'a> {
    types: &'a mut Types,
    /// What the last deserialized thing was.
    node: Node,
    /// The named types around this place. Within one of them again, it is only made up: smallest, and without notes.
    open: Vec<usize>,
    depth: usize,
}

impl Tracer<'_> {
    /// A tensor, which is nothing that the format could make up.
    pub(super) fn tensor(&mut self) -> Result<Tensor, CodecError> {
        self.node = Node::Word("Tensor");
        Tensor::scalar(0_u8).map_err(|error| CodecError::Custom(error.to_string()))
    }

    fn nested<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T, CodecError>) -> Result<T, CodecError> {
        self.types.places += 1;
        if self.depth == DEPTH_MAX || self.types.places > PLACES_MAX {
            self.types.retries = self.types.places <= PLACES_MAX && self.takes_another_variant();
            return Err(CodecError::TooDeep);
        }
        self.depth += 1;
        let result = run(self);
        self.depth -= 1;
        result
    }

    /// The innermost enum that can take its next variant for its smallest; `false` if none can.
    fn takes_another_variant(&mut self) -> bool {
        self.open.iter().rev().any(|index| match &mut self.types.all[*index].body {
            Body::Enum { variants, smallest, .. } if *smallest + 1 < variants.len() => {
                *smallest += 1;
                true
            }
            _ => false,
        })
    }

    /// Whether a type is within itself here.
    fn is_within_itself(&self) -> bool {
        self.open.last().is_some_and(|last| self.open[..self.open.len() - 1].contains(last))
    }

    /// Deserializes a type of that name by `run`, which says what is in it.
    fn named<V, T>(
        &mut self,
        name: &'static str,
        run: impl FnOnce(&mut Self, usize) -> Result<(T, Option<Body>), CodecError>,
    ) -> Result<T, CodecError> {
        let index = self.types.index(std::any::type_name::<V>(), name);
        let within_itself = self.open.contains(&index);
        self.open.push(index);
        let result = self.nested(|tracer| run(tracer, index));
        self.open.pop();
        let (value, body) = result?;
        if let Some(body) = body.filter(|_| !within_itself) {
            self.types.all[index].body = body;
        }
        self.node = Node::Named(index);
        Ok(value)
    }

    fn fields<'de, V: Visitor<'de>>(&mut self, len: usize, visitor: V) -> Result<(V::Value, Vec<Node>), CodecError> {
        let mut nodes = Vec::new();
        let value = self.nested(|tracer| visitor.visit_seq(Elements { tracer, left: len, nodes: &mut nodes }))?;
        Ok((value, nodes))
    }
}

macro_rules! words {
    ($($method:ident $visit:ident $value:expr => $word:literal),* $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
            let value = visitor.$visit($value);
            self.node = Node::Word($word);
            value
        }
    )*};
}

impl<'de> de::Deserializer<'de> for &mut Tracer<'_> {
    type Error = CodecError;

    fn is_human_readable(&self) -> bool {
        false
    }

    words! {
        deserialize_bool visit_bool true => "bool",
        deserialize_i8 visit_i8 1 => "i8",
        deserialize_i16 visit_i16 1 => "i16",
        deserialize_i32 visit_i32 1 => "i32",
        deserialize_i64 visit_i64 1 => "i64",
        deserialize_i128 visit_i128 1 => "i128",
        deserialize_u8 visit_u8 1 => "u8",
        deserialize_u16 visit_u16 1 => "u16",
        deserialize_u32 visit_u32 1 => "u32",
        deserialize_u64 visit_u64 1 => "u64",
        deserialize_u128 visit_u128 1 => "u128",
        deserialize_f32 visit_f32 1.0 => "f32",
        deserialize_f64 visit_f64 1.0 => "f64",
        deserialize_char visit_char 'a' => "char",
        deserialize_str visit_borrowed_str "" => "str",
        deserialize_string visit_string String::new() => "str",
        deserialize_bytes visit_borrowed_bytes b"" => "bytes",
        deserialize_byte_buf visit_byte_buf Vec::new() => "bytes",
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let value = visitor.visit_unit();
        self.node = Node::Word("()");
        value
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        if self.is_within_itself() {
            return visitor.visit_none();
        }
        let value = self.nested(|tracer| visitor.visit_some(&mut *tracer))?;
        self.node = Node::Option(Box::new(self.node.clone()));
        Ok(value)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let len = usize::from(!self.is_within_itself());
        let (value, mut nodes) = self.fields(len, visitor)?;
        self.node = Node::List(Box::new(nodes.pop().unwrap_or(Node::Word("…"))));
        Ok(value)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, CodecError> {
        let left = 2 * usize::from(!self.is_within_itself());
        let mut nodes = Vec::new();
        let value = self.nested(|tracer| visitor.visit_map(Elements { tracer, left, nodes: &mut nodes }))?;
        let mut next = || Box::new(nodes.pop().unwrap_or(Node::Word("…")));
        let (of_value, of_key) = (next(), next());
        self.node = Node::Map(of_key, of_value);
        Ok(value)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, CodecError> {
        let (value, nodes) = self.fields(len, visitor)?;
        self.node = Node::Tuple(nodes);
        Ok(value)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, CodecError> {
        self.named::<V, _>(name, |_, _| Ok((visitor.visit_unit()?, Some(Body::Unit))))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.named::<V, _>(name, |tracer, _| {
            let value = visitor.visit_newtype_struct(&mut *tracer)?;
            Ok((value, Some(Body::Newtype(tracer.node.clone()))))
        })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.named::<V, _>(name, |tracer, _| {
            let (value, nodes) = tracer.fields(len, visitor)?;
            Ok((value, Some(Body::Tuple(nodes))))
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.named::<V, _>(name, |tracer, _| {
            let (value, nodes) = tracer.fields(fields.len(), visitor)?;
            Ok((value, Some(Body::Struct(fields.iter().copied().zip(nodes).collect()))))
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        self.named::<V, _>(name, |tracer, index| {
            let within_itself = tracer.is_within_itself();
            if let body @ Body::Unknown = &mut tracer.types.all[index].body {
                *body = Body::Enum { variants: names.iter().map(|name| (*name, None)).collect(), seen: 0, smallest: 0 };
            }
            let Body::Enum { variants, seen, smallest } = &mut tracer.types.all[index].body else {
                return Err(CodecError::NotSelfDescribing { what: "a type that is an enum and none" });
            };
            *seen += 1;
            // Else in turn: another enum within may still miss some of its own.
            let unseen = variants.iter().position(|(_, body)| body.is_none());
            let in_turn = *seen % variants.len().max(1);
            let variant = if within_itself { *smallest } else { unseen.unwrap_or(in_turn) };
            let mut body = Body::Unit;
            let value = visitor.visit_enum(Variant { tracer, index: variant as u32, body: &mut body })?;
            let Body::Enum { variants, .. } = &mut tracer.types.all[index].body else {
                return Err(CodecError::NotSelfDescribing { what: "a type that is an enum and none" });
            };
            if !within_itself && let Some((_, known)) = variants.get_mut(variant) {
                *known = Some(body);
            }
            Ok((value, None))
        })
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, CodecError> {
        Err(CodecError::NotSelfDescribing { what: "deserialize_any" })
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, _: V) -> Result<V::Value, CodecError> {
        Err(CodecError::NotSelfDescribing { what: "deserialize_identifier" })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, CodecError> {
        Err(CodecError::NotSelfDescribing { what: "deserialize_ignored_any" })
    }
}

/// So many elements, or keys and values, and what they were.
struct Elements<'t, 'a, 'n> {
    tracer: &'t mut Tracer<'a>,
    left: usize,
    nodes: &'n mut Vec<Node>,
}

impl Elements<'_, '_, '_> {
    fn next<'de, S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, CodecError> {
        self.left -= 1;
        self.tracer.types.places += 1;
        self.tracer.node = Node::Word("()");
        let value = seed.deserialize(&mut *self.tracer)?;
        self.nodes.push(self.tracer.node.clone());
        Ok(value)
    }
}

impl<'de> de::SeqAccess<'de> for Elements<'_, '_, '_> {
    type Error = CodecError;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, CodecError> {
        if self.left == 0 { Ok(None) } else { self.next(seed).map(Some) }
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left)
    }
}

impl<'de> de::MapAccess<'de> for Elements<'_, '_, '_> {
    type Error = CodecError;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, CodecError> {
        if self.left == 0 { Ok(None) } else { self.next(seed).map(Some) }
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, CodecError> {
        self.next(seed)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.left / 2)
    }
}

/// One variant of an enum.
struct Variant<'t, 'a, 'n> {
    tracer: &'t mut Tracer<'a>,
    index: u32,
    body: &'n mut Body,
}

impl<'de> de::EnumAccess<'de> for Variant<'_, '_, '_> {
    type Error = CodecError;
    type Variant = Self;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), CodecError> {
        let index: U32Deserializer<CodecError> = self.index.into_deserializer();
        Ok((seed.deserialize(index)?, self))
    }
}

impl<'de> de::VariantAccess<'de> for Variant<'_, '_, '_> {
    type Error = CodecError;

    fn unit_variant(self) -> Result<(), CodecError> {
        *self.body = Body::Unit;
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, CodecError> {
        let value = self.tracer.nested(|tracer| seed.deserialize(&mut *tracer))?;
        *self.body = Body::Newtype(self.tracer.node.clone());
        Ok(value)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, CodecError> {
        let (value, nodes) = self.tracer.fields(len, visitor)?;
        *self.body = Body::Tuple(nodes);
        Ok(value)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, CodecError> {
        let (value, nodes) = self.tracer.fields(fields.len(), visitor)?;
        *self.body = Body::Struct(fields.iter().copied().zip(nodes).collect());
        Ok(value)
    }
}

impl fmt::Debug for Tracer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").field("node", &self.node).field("depth", &self.depth).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};
    use std::num::NonZeroU8;

    use serde::{Deserialize, Deserializer};

    use super::*;
    use crate::{DType, Device};

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "deserialized only")]
    struct Layer {
        weight: Tensor,
        bias: Option<Tensor>,
        #[serde(rename = "scale")]
        factor: f32,
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "deserialized only")]
    enum Part {
        Unit,
        One(Box<Layer>),
        Two(u8, String),
        Fields { inner: Box<Part>, list: Vec<Part>, how: How },
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "deserialized only")]
    enum How {
        This,
        That(Vec<How>),
        Other(Box<Option<Layer>>),
    }

    /// No value of its first variants ends.
    #[derive(Deserialize)]
    #[expect(dead_code, reason = "deserialized only")]
    enum Sum {
        Add(Box<Sum>, Box<Sum>),
        Neg(Box<Sum>),
        Of(Box<Term>),
    }

    #[derive(Deserialize)]
    #[expect(dead_code, reason = "deserialized only")]
    enum Term {
        Sum(Sum),
        Number(i64),
    }

    /// No value of it ends.
    #[derive(Deserialize)]
    struct Endless(#[expect(dead_code, reason = "deserialized only")] Box<Endless>);

    #[derive(Deserialize)]
    struct Meters(#[expect(dead_code, reason = "deserialized only")] f64);

    #[derive(Deserialize)]
    struct Unit;

    mod other {
        /// A type of another crate, with the name of one here.
        #[derive(serde::Deserialize)]
        #[expect(dead_code, reason = "deserialized only")]
        pub(super) struct Layer {
            weight: i64,
        }
    }

    struct Picky;

    impl<'de> Deserialize<'de> for Picky {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            match u8::deserialize(deserializer)? {
                200.. => Ok(Self),
                _ => Err(de::Error::custom("too small")),
            }
        }
    }

    struct Panics;

    impl<'de> Deserialize<'de> for Panics {
        fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            panic!("another crate's bug");
        }
    }

    const LAYER: &str = "Layer{weight: Tensor, bias: Tensor?, scale: f32}";

    #[test]
    fn structure_is_told_by_the_names_of_serde() {
        assert_eq!(shape::<()>(), "()");
        assert_eq!(shape::<(bool, i8, u128, f64, char, String)>(), "(bool, i8, u128, f64, char, str)");
        assert_eq!(shape::<(Vec<Option<u8>>, HashSet<u16>, [f32; 5])>(), "([u8?], [u16], (f32; 5))");
        assert_eq!(shape::<BTreeMap<String, (Meters, Unit)>>(), "{str: (Meters(f64), Unit)}");
        assert_eq!(shape::<(DType, Device, NonZeroU8)>(), "(u8, (u8, u16), u8)");
        assert_eq!(shape::<Layer>(), LAYER);
        assert_eq!(shape::<(Layer, Vec<Layer>)>(), format!("({LAYER}, [Layer])"), "told once");
        assert_eq!(
            shape::<(Layer, other::Layer)>(),
            format!("({LAYER}, Layer{{weight: i64}})"),
            "two types of one name"
        );
    }

    #[test]
    fn every_variant_of_recursive_types_is_told() {
        let how = format!("How{{This | That([How]) | Other({LAYER}?)}}");
        assert_eq!(shape::<How>(), how);
        let expected = format!(
            "Part{{Unit | One({LAYER}) | Two(u8, str) | Fields{{inner: Part, list: [Part], how: {}}}}}",
            how.replace(LAYER, "Layer")
        );
        assert_eq!(shape::<Part>(), expected);
        assert_eq!(shape::<Vec<(u8, Part)>>(), format!("[(u8, {expected})]"));
        assert_eq!(shape::<Sum>(), "Sum{Add(Sum, Sum) | Neg(Sum) | Of(Term{Sum(Sum) | Number(i64)})}");
    }

    /// H2
    #[test]
    fn types_without_end_or_of_too_many_places_are_opaque() {
        assert!(shape::<Endless>().ends_with("::Endless"));
        assert_eq!(shape::<[[[[u8; 32]; 32]; 32]; 4]>(), "[[[[u8; 32]; 32]; 32]; 4]", "its Rust name");
    }

    /// H1, and what tells two opaque types apart.
    #[test]
    fn what_accepts_no_made_up_value_is_its_own_name() {
        assert!(shape::<Picky>().ends_with("::Picky"), "{}", shape::<Picky>());
        assert_ne!(shape::<(u8, Picky)>(), shape::<(u16, Picky)>());
        assert!(shape::<Panics>().ends_with("::Panics"));
        assert_eq!(shape::<std::collections::HashMap<(), ()>>(), "{(): ()}");
    }

    #[test]
    fn a_long_text_is_cut_and_still_tells_types_apart() {
        assert_eq!(cut("é".repeat(2048)), "é".repeat(2048));
        let (one, other) = (cut("é".repeat(3000)), cut("é".repeat(3001)));
        assert!(one != other && one.len() < 4200, "{} bytes", one.len());
    }
}
