//! Reads signatures: recursive descent over bytes.
//!
//! Invariant P1: whatever the text is, the answer is a [`Schema`] or a [`ParseError`] with the byte's position: no panic, no
//! recursion deeper than [`DEPTH_MAX`], no more memory than a multiple of [`TEXT_BYTES_MAX`].
//! Invariant P2: what is read prints as a text that is read as the same, and prints the same.

use std::fmt;

use crate::literal::ESCAPES;
use crate::types::{OPAQUE, WORDS};
use crate::{Alias, Argument, Literal, Name, Return, Schema, Type};

/// The longest text of one signature. Torch's longest has 1.6 KiB.
pub const TEXT_BYTES_MAX: usize = 64 << 10;
/// How deep types and default values may nest.
pub const DEPTH_MAX: usize = 32;
/// Arguments of one signature, and its results.
pub const ITEMS_MAX: usize = 256;

/// The length of a list that one number may stand for.
const LIST_LEN_MAX: u32 = 64;

/// Why a text is no signature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no signature: at byte {at}, {expected} was expected, and there is {found}; such as `ns::name.overload(Tensor self, int[2] size=[1, 1], *, float? scale=None) -> Tensor`"
)]
pub struct ParseError {
    /// Where, in bytes from the start.
    pub at: usize,
    /// What may stand there.
    pub expected: &'static str,
    /// What does.
    pub found: Found,
}

/// What stands where something else was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing: the text ends.
    End,
    /// This text, cut short.
    Text(String),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => f.write_str("the end"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// Reads one signature, all of `text`.
pub(crate) fn parse(text: &str) -> Result<Schema, ParseError> {
    let mut parser = Parser { text, at: 0, depth: 0 };
    if text.len() > TEXT_BYTES_MAX {
        parser.at = TEXT_BYTES_MAX;
        return Err(parser.expected("the end, 64 KiB after the start at the latest,"));
    }
    let schema = parser.schema()?;
    match parser.peek() {
        None => Ok(schema),
        Some(_) => Err(parser.expected("the end")),
    }
}

type Read<T> = Result<T, ParseError>;

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// The next byte that is no space.
    fn peek(&mut self) -> Option<u8> {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
        self.byte()
    }

    /// The next byte, a space too.
    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Takes `token` if it is next.
    fn takes(&mut self, token: &str) -> bool {
        self.peek();
        let taken = self.rest().starts_with(token);
        self.at += if taken { token.len() } else { 0 };
        taken
    }

    fn expect(&mut self, token: &str, expected: &'static str) -> Read<()> {
        if self.takes(token) { Ok(()) } else { Err(self.expected(expected)) }
    }

    fn expected(&self, expected: &'static str) -> ParseError {
        const SHOWN_CHARS_MAX: usize = 24;
        // A position behind an escape may be within a character.
        let at = (0..=self.at.min(self.text.len())).rev().find(|at| self.text.is_char_boundary(*at)).unwrap_or(0);
        let found = match &self.text[at..] {
            "" => Found::End,
            rest => Found::Text(rest.chars().take(SHOWN_CHARS_MAX).collect()),
        };
        ParseError { at, expected, found }
    }

    /// Letters, digits and `_`, not starting with a digit; empty if there are none.
    fn word(&mut self) -> &'a str {
        self.peek();
        let rest = self.rest();
        let len = rest.bytes().take_while(|byte| byte.is_ascii_alphanumeric() || *byte == b'_').count();
        let word = if rest.starts_with(|first: char| first.is_ascii_digit()) { "" } else { &rest[..len] };
        self.at += word.len();
        word
    }

    fn identifier(&mut self, expected: &'static str) -> Read<String> {
        match self.word() {
            "" => Err(self.expected(expected)),
            word => Ok(word.to_owned()),
        }
    }

    /// Runs `read` one level deeper.
    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Read<T>) -> Read<T> {
        self.enter()?;
        let read = read(self);
        self.depth -= 1;
        read
    }

    fn enter(&mut self) -> Read<()> {
        if self.depth == DEPTH_MAX {
            return Err(self.expected("less depth than 32 levels"));
        }
        self.depth += 1;
        Ok(())
    }

    fn schema(&mut self) -> Read<Schema> {
        let name = self.name()?;
        self.expect("(", "`(`")?;
        let (arguments, takes_more) = self.arguments()?;
        self.expect("->", "`->`")?;
        let (returns, gives_more) = self.returns()?;
        Ok(Schema { name, arguments, takes_more, returns, gives_more })
    }

    fn name(&mut self) -> Read<Name> {
        let mut base = self.identifier("a name, such as `aten::add`,")?;
        while self.takes("::") {
            base.push_str("::");
            base.push_str(&self.identifier("a name behind `::`")?);
        }
        let overload = if self.takes(".") { self.identifier("an overload's name behind `.`")? } else { String::new() };
        Ok(Name { base, overload })
    }

    /// Everything up to and with `)`.
    fn arguments(&mut self) -> Read<(Vec<Argument>, bool)> {
        let mut arguments: Vec<Argument> = Vec::new();
        let mut keyword_only = false;
        if self.takes(")") {
            return Ok((arguments, false));
        }
        loop {
            if self.takes("...") {
                self.expect(")", "`)` behind `...`")?;
                return Ok((arguments, true));
            }
            if self.peek() == Some(b'*') {
                if keyword_only {
                    return Err(self.expected("an argument, as `*` stands once,"));
                }
                self.at += 1;
                keyword_only = true;
                self.expect(",", "`,` and an argument behind `*`")?;
                if self.peek() == Some(b'*') || self.rest().starts_with("...") {
                    return Err(self.expected("an argument behind `*`"));
                }
            }
            if arguments.len() == ITEMS_MAX {
                return Err(self.expected("no more than 256 arguments"));
            }
            let of = self.ty()?;
            let name = self.identifier("an argument's name")?;
            let default = if self.takes("=") { Some(self.literal()?) } else { None };
            arguments.push(Argument { of, name, default, keyword_only });
            if self.takes(")") {
                return Ok((arguments, false));
            }
            self.expect(",", "`,` or `)`")?;
        }
    }

    fn returns(&mut self) -> Read<(Vec<Return>, bool)> {
        if self.takes("...") {
            return Ok((Vec::new(), true));
        }
        if !self.takes("(") {
            return Ok((vec![self.one_return()?], false));
        }
        let mut returns = Vec::new();
        if self.takes(")") {
            return Ok((returns, false));
        }
        loop {
            if self.takes("...") {
                self.expect(")", "`)` behind `...`")?;
                return Ok((returns, true));
            }
            if returns.len() == ITEMS_MAX {
                return Err(self.expected("no more than 256 results"));
            }
            returns.push(self.one_return()?);
            if self.takes(")") {
                return Ok((returns, false));
            }
            self.expect(",", "`,` or `)`")?;
        }
    }

    fn one_return(&mut self) -> Read<Return> {
        let of = self.ty()?;
        let name = match self.word() {
            "" => None,
            word => Some(word.to_owned()),
        };
        Ok(Return { of, name })
    }

    fn ty(&mut self) -> Read<Type> {
        let outside = self.depth;
        let mut of = self.nested(Self::base_type)?;
        // Each suffix is a level around what stands before it.
        loop {
            of = match self.peek() {
                Some(b'[') => {
                    self.at += 1;
                    let len = self.list_len()?;
                    Type::List(Box::new(of), len)
                }
                Some(b'?') => {
                    self.at += 1;
                    Type::Optional(Box::new(of))
                }
                Some(b'(') => {
                    self.at += 1;
                    Type::Aliased(Box::new(of), self.alias()?)
                }
                _ => {
                    self.depth = outside;
                    return Ok(of);
                }
            };
            self.enter()?;
        }
    }

    fn base_type(&mut self) -> Read<Type> {
        if self.takes("(") {
            return Ok(Type::Tuple(self.types()?));
        }
        self.peek();
        let start = self.at;
        let mut name = self.identifier("a type")?;
        while self.takes(".") {
            name.push('.');
            name.push_str(&self.identifier("a name behind `.`")?);
        }
        if let Some((_, word)) = WORDS.iter().find(|(text, _)| *text == name) {
            return Ok(word.clone());
        }
        let mut parameters = |count: usize| -> Read<Vec<Type>> {
            self.expect("(", "`(`")?;
            let types = self.types()?;
            if types.len() == count { Ok(types) } else { Err(self.expected("another number of types before this")) }
        };
        let single = |of: Vec<Type>, make: fn(Box<Type>) -> Type| of.into_iter().next().map(|of| make(Box::new(of)));
        let made = match name.as_str() {
            "Dict" => {
                let mut of = parameters(2)?.into_iter();
                of.next().zip(of.next()).map(|(key, value)| Type::Dict(Box::new(key), Box::new(value)))
            }
            "RRef" => single(parameters(1)?, Type::RRef),
            "Future" => single(parameters(1)?, Type::Future),
            "Await" => single(parameters(1)?, Type::Await),
            opaque if OPAQUE.contains(&opaque) || opaque.contains('.') => Some(Type::Opaque(name)),
            variable if variable.starts_with(|first: char| first.is_ascii_lowercase()) => Some(Type::Variable(name)),
            _ => None,
        };
        made.ok_or_else(|| {
            self.at = start;
            self.expected("a type, such as `Tensor`, `Scalar`, `int`, `float`, `bool`, `str`, `Device`, `ScalarType`,")
        })
    }

    /// One or more types up to and with `)`.
    fn types(&mut self) -> Read<Vec<Type>> {
        let mut types = vec![self.ty()?];
        while !self.takes(")") {
            self.expect(",", "`,` or `)`")?;
            if types.len() == ITEMS_MAX {
                return Err(self.expected("no more than 256 types"));
            }
            types.push(self.ty()?);
        }
        Ok(types)
    }

    /// What stands between `[` and `]`, and that one.
    fn list_len(&mut self) -> Read<Option<u32>> {
        if self.takes("]") {
            return Ok(None);
        }
        let digits = self.digits();
        let len = digits.parse().ok().filter(|len: &u32| (1..=LIST_LEN_MAX).contains(len));
        let Some(len) = len else {
            self.at -= digits.len();
            return Err(self.expected("a length from 1 to 64, or `]`,"));
        };
        self.expect("]", "`]`")?;
        Ok(Some(len))
    }

    fn digits(&mut self) -> &'a str {
        let rest = self.rest();
        let digits = &rest[..rest.bytes().take_while(u8::is_ascii_digit).count()];
        self.at += digits.len();
        digits
    }

    /// What stands between `(` and `)` behind a type, and that one.
    fn alias(&mut self) -> Read<Alias> {
        let before = self.sets()?;
        let writes = self.takes("!");
        let after = if self.takes("->") { Some(self.sets()?) } else { None };
        self.expect(")", "`)` behind what may be shared")?;
        Ok(Alias { before, writes, after })
    }

    fn sets(&mut self) -> Read<Vec<String>> {
        let mut sets = Vec::new();
        loop {
            if sets.len() == ITEMS_MAX {
                return Err(self.expected("no more than 256 sets"));
            }
            let set = if self.takes("*") { "*".to_owned() } else { self.identifier("a set, such as `a` or `*`,")? };
            sets.push(set);
            if !self.takes("|") {
                return Ok(sets);
            }
        }
    }

    fn literal(&mut self) -> Read<Literal> {
        match self.peek() {
            Some(b'[') => {
                self.at += 1;
                self.nested(Self::list).map(Literal::List)
            }
            Some(quote @ (b'"' | b'\'')) => {
                self.at += 1;
                self.quoted(quote).map(Literal::Str)
            }
            Some(b'-' | b'.' | b'0'..=b'9') => self.number(),
            _ => Ok(match self.word() {
                "" => return Err(self.expected("a default value")),
                "None" => Literal::None,
                "True" => Literal::Bool(true),
                "False" => Literal::Bool(false),
                "inf" => Literal::Float(f64::INFINITY),
                "nan" => Literal::Float(f64::NAN),
                word => Literal::Name(word.to_owned()),
            }),
        }
    }

    fn list(&mut self) -> Read<Vec<Literal>> {
        let mut elements = Vec::new();
        if self.takes("]") {
            return Ok(elements);
        }
        loop {
            if elements.len() == ITEMS_MAX {
                return Err(self.expected("no more than 256 elements"));
            }
            elements.push(self.literal()?);
            if self.takes("]") {
                return Ok(elements);
            }
            self.expect(",", "`,` or `]`")?;
        }
    }

    fn number(&mut self) -> Read<Literal> {
        let start = self.at;
        let negative = self.takes("-");
        if negative && self.rest().starts_with("inf") {
            self.at += 3;
            return Ok(Literal::Float(f64::NEG_INFINITY));
        }
        self.digits();
        let mut whole = true;
        if self.byte() == Some(b'.') {
            whole = false;
            self.at += 1;
            self.digits();
        }
        if matches!(self.byte(), Some(b'e' | b'E')) {
            whole = false;
            self.at += 1;
            self.at += usize::from(matches!(self.byte(), Some(b'-' | b'+')));
            self.digits();
        }
        let text = &self.text[start..self.at];
        let number = if whole {
            text.parse().ok().map(Literal::Int)
        } else {
            text.parse().ok().filter(|number: &f64| number.is_finite()).map(Literal::Float)
        };
        number.ok_or_else(|| {
            self.at = start;
            self.expected("a number of at most 64 bits")
        })
    }

    /// What stands between two quotes, and the second. Octal escapes are bytes; together they must be UTF-8.
    fn quoted(&mut self, quote: u8) -> Read<String> {
        let start = self.at;
        let mut bytes = Vec::new();
        loop {
            let Some(byte) = self.byte() else { return Err(self.expected("a quote that ends the text")) };
            self.at += 1;
            if byte == quote {
                break;
            }
            bytes.push(if byte == b'\\' { self.escaped()? } else { byte });
        }
        String::from_utf8(bytes).map_err(|_| {
            self.at = start;
            self.expected("a text in UTF-8")
        })
    }

    /// What stands behind a backslash.
    fn escaped(&mut self) -> Read<u8> {
        let letter = self.byte();
        if let Some((raw, _)) = ESCAPES.iter().find(|(_, escape)| letter == Some(*escape)) {
            self.at += 1;
            return Ok(*raw);
        }
        let octal = self.text.as_bytes().get(self.at..self.at + 3).unwrap_or_default();
        let value = octal
            .iter()
            .try_fold(0_u32, |value, digit| (b'0'..=b'7').contains(digit).then(|| value * 8 + u32::from(digit - b'0')));
        match value.filter(|_| octal.len() == 3).and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                self.at += 3;
                Ok(byte)
            }
            None => Err(self.expected("an escape: one of \\ ' \" a b f n r t v, or three octal digits,")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn printed(text: &str) -> String {
        parse(text).unwrap_or_else(|error| panic!("{text}: {error}")).to_string()
    }

    /// P2, where the text is not the canonical one.
    #[test]
    fn spaces_quotes_and_numbers_are_printed_one_way() {
        for (text, expected) in [
            ("f()->()", "f() -> ()"),
            (
                "  a::b::f . over ( int x , * , int y = 3 ) -> ( int , Tensor t ) ",
                "a::b::f.over(int x, *, int y=3) -> (int, Tensor t)",
            ),
            (
                "f(str a='no\\'ne', float b=1.0, float c=1e-5, float d=.5) -> int",
                r#"f(str a="no\'ne", float b=1., float c=1.0000000000000001e-05, float d=0.5) -> int"#,
            ),
            ("f(str a=\"é\\303\\251\\007\") -> int", r#"f(str a="\303\251\303\251\a") -> int"#),
            (
                "f(int a=-9223372036854775808, float b=-0.0, float c=-inf) -> (int)",
                "f(int a=-9223372036854775808, float b=-0., float c=-inf) -> int",
            ),
            (
                "f(int[ 2 ] ? a=[ 1,-2 ], Tensor ( a ! -> * | b ) [ ] b=[]) -> ...",
                "f(int[2]? a=[1, -2], Tensor(a! -> *|b)[] b=[]) -> ...",
            ),
            (
                "f(int reduction=Mean, MemoryFormat m=contiguous_format) -> Tensor(a|b)",
                "f(int reduction=Mean, MemoryFormat m=contiguous_format) -> Tensor(a|b)",
            ),
            (
                "f((int,str)[] a, Dict(str,Dict(int,t)) b, RRef(t) c, ...) -> ((int, t))",
                "f((int, str)[] a, Dict(str, Dict(int, t)) b, RRef(t) c, ...) -> ((int, t))",
            ),
        ] {
            assert_eq!(printed(text), expected);
            assert_eq!(printed(expected), expected);
        }
    }

    #[test]
    fn an_error_says_at_which_byte_and_what_may_stand_there() {
        for (text, at, expected) in [
            ("", 0, "a name"),
            ("aten::", 6, "behind `::`"),
            ("f.(int a) -> int", 2, "overload"),
            ("f", 1, "`(`"),
            ("f(int a", 7, "`,` or `)`"),
            ("f(int) -> int", 5, "argument's name"),
            ("f(Tensr a) -> int", 2, "a type"),
            ("f(*, *, int a) -> int", 5, "an argument"),
            ("f(int a, *) -> int", 10, "behind `*`"),
            ("f(..., int a) -> int", 5, "`)` behind"),
            ("f(int a)", 8, "`->`"),
            ("f(int a) -> int x y", 18, "the end"),
            ("f(int[0] a) -> int", 6, "a length"),
            ("f(int[99999999999] a) -> int", 6, "a length"),
            ("f(int a=9223372036854775808) -> int", 8, "64 bits"),
            ("f(float a=1e999) -> int", 10, "64 bits"),
            ("f(str a=\"x) -> int", 18, "quote"),
            ("f(str a=\"\\q\") -> int", 10, "escape"),
            ("f(str a=\"\\777\") -> int", 10, "escape"),
            ("f(str a=\"\\377\") -> int", 9, "UTF-8"),
            ("f(Tensor(a!! b) -> int", 11, "`)`"),
            ("f(Dict(int) a) -> int", 11, "another number"),
            ("f(int a=) -> int", 8, "a default value"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.at == at && error.expected.contains(expected), "{text}: {error}");
        }
        assert_eq!(parse("f(é").expect_err("a letter").found, Found::Text("é".to_owned()));
    }

    /// P1: by nesting, by number, by length.
    #[test]
    fn limits_are_errors() {
        let deep = |levels: usize| format!("f({}int{} a) -> int", "(".repeat(levels), ")".repeat(levels));
        assert!(parse(&deep(DEPTH_MAX - 1)).is_ok());
        assert!(parse(&deep(DEPTH_MAX)).expect_err("too deep").expected.contains("depth"));
        assert!(parse(&format!("f(int{} a) -> int", "[]".repeat(DEPTH_MAX))).is_ok());
        assert!(parse(&format!("f(int{} a) -> int", "[]".repeat(DEPTH_MAX + 1))).is_err());
        assert!(parse(&format!("f(int a={}) -> int", "[".repeat(100_000))).is_err());
        assert!(
            parse(&format!("f(int a={}) -> int", "[".repeat(10_000))).expect_err("deep").expected.contains("depth")
        );
        let many: Vec<String> = (0..=ITEMS_MAX).map(|index| format!("int a{index}")).collect();
        assert!(parse(&format!("f({}) -> int", many[1..].join(", "))).is_ok());
        assert!(parse(&format!("f({}) -> int", many.join(", "))).expect_err("many").expected.contains("256"));
    }
}
