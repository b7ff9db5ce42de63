//! Prints types the same way whatever the compiler, so that signatures of two builds compare as text.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};
use quote::ToTokens;

/// `(Tensor, Vec<f32>) -> Option<Tensor>`: the types as written, with one way to put spaces.
pub(crate) fn text(arguments: &[&syn::Type], output: &TokenStream) -> String {
    let mut text = String::from("(");
    for (index, argument) in arguments.iter().enumerate() {
        if index > 0 {
            text.push_str(", ");
        }
        print(argument.to_token_stream(), &mut text);
    }
    text.push_str(") -> ");
    print(output.clone(), &mut text);
    text
}

/// Appends `tokens`: a space between words, after `,` and `;`, and around `+`, `=` and `->`; none elsewhere.
fn print(tokens: TokenStream, text: &mut String) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Ident(_) | TokenTree::Literal(_) => {
                if text.ends_with(|last: char| last.is_alphanumeric() || last == '_' || last == '>') {
                    text.push(' ');
                }
                text.push_str(&token.to_string());
            }
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::Brace => ("{", "}"),
                    // Put around a type by `macro_rules`, and invisible.
                    Delimiter::None => ("", ""),
                };
                text.push_str(open);
                print(group.stream(), text);
                // `(T, )`, the tuple of one, is `(T,)`.
                text.truncate(text.trim_end().len());
                text.push_str(close);
            }
            TokenTree::Punct(punct) => match (punct.as_char(), tokens.peek()) {
                // `Vec<T,>` is `Vec<T>`.
                (',', Some(TokenTree::Punct(next))) if next.as_char() == '>' => {}
                (',' | ';', _) => text.extend([punct.as_char(), ' ']),
                ('-', Some(TokenTree::Punct(next))) if next.as_char() == '>' && punct.spacing() == Spacing::Joint => {
                    tokens.next();
                    text.push_str(" -> ");
                }
                ('+' | '=', _) => text.extend([' ', punct.as_char(), ' ']),
                (character, _) => text.push(character),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(source: &str) -> String {
        let mut text = String::new();
        print(source.parse().unwrap(), &mut text);
        text
    }

    #[test]
    fn spaces_of_the_source_do_not_matter() {
        for (source, expected) in [
            ("Vec < Option<  f32 > , >", "Vec<Option<f32>>"),
            ("std :: collections::HashMap<String,Vec<u8>>", "std::collections::HashMap<String, Vec<u8>>"),
            ("( Tensor , )", "(Tensor,)"),
            ("(f32,u8 , )", "(f32, u8,)"),
            ("[ f32 ;4 ]", "[f32; 4]"),
            ("Box<dyn Fn( u8 )->u8+Send>", "Box<dyn Fn(u8) -> u8 + Send>"),
            ("Box<dyn Iterator<Item=u8>>", "Box<dyn Iterator<Item = u8>>"),
            ("<Vec<u8> as Trait>::Out", "<Vec<u8> as Trait>::Out"),
            ("Cow<'static,str>", "Cow<'static, str>"),
            ("()", "()"),
        ] {
            assert_eq!(printed(source), expected, "{source}");
        }
    }
}
