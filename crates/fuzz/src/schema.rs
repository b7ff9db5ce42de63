//! The parser of signatures: texts that people write, and read.

use farcall_schema::{Found, Schema};
use farcall_transport::fuzzing::Golden;

/// What is read prints as a text that is read as the same; an error points into the text.
pub(crate) fn schema(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    match text.parse::<Schema>() {
        Ok(schema) => {
            let printed = schema.to_string();
            let again: Schema = printed.parse().unwrap_or_else(|error| panic!("{printed}: {error}"));
            assert_eq!(again.to_string(), printed);
            assert_eq!(again.arguments.len(), schema.arguments.len());
            true
        }
        Err(error) => {
            assert!(text.is_char_boundary(error.at), "{error}");
            assert_eq!(error.found == Found::End, error.at == text.len(), "{error}");
            false
        }
    }
}

/// Between them, every part of the syntax.
pub(crate) fn golden() -> Vec<Golden> {
    let texts = [
        ("operator", "aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor"),
        (
            "defaults",
            r#"f(int[2] a=[1, -2], float b=1e-08, str c="\"\'\\\303\251", bool d=True, float e=-inf, int r=Mean) -> ()"#,
        ),
        (
            "aliases",
            "f.out(Tensor(a!)[] a, Tensor(b -> *)? b, t(c|d) c, *, Dict(str, t)(e!) e) -> (Tensor(a!) x, t[][])",
        ),
        (
            "types",
            "f((int, str)[] a, RRef(t) b, Future(t)? c, Await(t) d, x.y.Z e, SymInt[1]? f, Generator g) -> ((t, Any)[])",
        ),
        ("more", "prim::Print(Scalar a, ...) -> ..."),
        ("spaces", " a :: b . c ( ScalarType\tx , Device y ) ->\n( Layout , ... ) "),
        ("refused-cut", "aten::add.Tensor(Tensor self, Tensor oth"),
    ];
    let deep = format!("f({}int{} a={}1{}) -> int", "(".repeat(30), ")".repeat(30), "[".repeat(30), "]".repeat(30));
    let texts = texts.into_iter().map(|(name, text)| (name, text.as_bytes().to_vec()));
    texts.chain([("deep", deep.into_bytes())]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_inputs_are_read_unless_they_are_named_otherwise() {
        for (name, bytes) in golden() {
            assert_eq!(schema(&bytes), !name.starts_with("refused"), "{name}");
        }
    }
}
