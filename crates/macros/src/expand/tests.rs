//! The output's text for each shape of function, and each refusal's text. Written out by hand, not recorded.

use super::*;

/// The tokens of `source`, one space between any two.
fn normal(source: &str) -> String {
    fn collect(tokens: TokenStream, words: &mut Vec<String>) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => {
                    let around = proc_macro2::Group::new(group.delimiter(), TokenStream::new()).to_string();
                    let (open, close) = around.split_at(around.len() / 2);
                    words.push(open.trim().to_owned());
                    collect(group.stream(), words);
                    words.push(close.trim().to_owned());
                }
                token => words.push(token.to_string()),
            }
        }
    }
    let mut words = Vec::new();
    collect(source.parse().unwrap(), &mut words);
    words.join(" ")
}

fn expanded(options: &str, item: &str) -> String {
    match function(options.parse().unwrap(), item.parse().unwrap()) {
        Ok(output) => normal(&output.to_string()),
        Err(error) => panic!("{error}"),
    }
}

fn refused(options: &str, item: &str) -> String {
    match function(options.parse().unwrap(), item.parse().unwrap()) {
        Ok(output) => panic!("accepted: {output}"),
        Err(error) => error.to_string(),
    }
}

/// What all expansions have in common, around what tells them apart.
struct Expected<'a> {
    cfg: &'a str,
    docs: &'a str,
    vis: &'a str,
    ident: &'a str,
    args: &'a str,
    output: &'a str,
    name: &'a str,
    signature: &'a str,
    inline: bool,
    handler: &'a str,
    run: &'a str,
}

impl Expected<'_> {
    fn text(&self) -> String {
        let Self { cfg, docs, vis, ident, args, output, name, signature, inline, handler, run } = self;
        normal(&format!(
            "{cfg} {docs}
            #[allow(non_camel_case_types, reason = \"named after its function\")]
            #[derive(Clone, Copy, Debug)]
            {vis} struct {ident};
            {cfg} impl ::farcall::__private::Function for {ident} {{
                type Args = {args};
                type Output = {output};
                const NAME: &'static str = {name};
                const SIGNATURE: &'static str = {signature:?};
                const INLINE: bool = {inline};
                fn handler() -> ::farcall::__private::Handler {{ ::farcall::__private::Handler::{handler} }}
                fn cell() -> &'static ::farcall::__private::FunctionCell {{
                    static CELL: ::farcall::__private::FunctionCell = ::farcall::__private::FunctionCell::new();
                    &CELL
                }}
            }}
            {cfg} ::farcall::__private::inventory::submit! {{
                ::farcall::__private::Registration::of::<{ident}>()
            }}
            {cfg} impl {ident} {{
                #[doc = r\" Runs the function here, without a call.\"]
                {run}
            }}"
        ))
    }
}

#[test]
fn a_function_with_context_and_result() {
    let output = expanded(
        "",
        "/// Multiplies.
        #[must_use]
        pub fn scale(cx: &Call, x: Tensor, k: f64) -> Result<Tensor> { ops::mul_scalar(&x, k, cx.stream(x.device())) }",
    );
    let expected = Expected {
        cfg: "",
        docs: "/// Multiplies.",
        vis: "pub",
        ident: "scale",
        args: "(Tensor, f64,)",
        output: "<Result<Tensor> as ::farcall::__private::Outcome>::Value",
        name: "::core::concat!(::core::module_path!(), \"::\", \"scale\")",
        signature: "(Tensor, f64) -> Tensor",
        inline: false,
        handler: "sync(
            |context: &::farcall::__private::Call, (argument_0, argument_1,): (Tensor, f64,)|
                -> ::core::result::Result<Self::Output, ::farcall::Error> {
                ::farcall::__private::Outcome::into_outcome(Self::run(context, argument_0, argument_1))
            },
        )",
        run: "#[must_use]
            pub fn run(cx: &Call, x: Tensor, k: f64) -> Result<Tensor> {
                ops::mul_scalar(&x, k, cx.stream(x.device()))
            }",
    };
    assert_eq!(output, expected.text());
}

#[test]
fn an_async_function_owns_its_context() {
    let output = expanded(
        "name = \"weights::publish\"",
        "#[cfg(unix)] async fn publish(cx: farcall::Call, (a, b): (u8, u8)) -> io::Result<Vec<u8>> { body }",
    );
    let expected = Expected {
        cfg: "#[cfg(unix)]",
        docs: "",
        vis: "",
        ident: "publish",
        args: "((u8, u8),)",
        output: "<io::Result<Vec<u8>> as ::farcall::__private::Outcome>::Value",
        name: "\"weights::publish\"",
        signature: "((u8, u8)) -> Vec<u8>",
        inline: false,
        handler: "future(
            |context: ::farcall::__private::Call, (argument_0,): ((u8, u8),)| async move {
                ::farcall::__private::Outcome::into_outcome(Self::run(context, argument_0).await)
            },
        )",
        run: "async fn run(cx: farcall::Call, (a, b): (u8, u8)) -> io::Result<Vec<u8>> { body }",
    };
    assert_eq!(output, expected.text());
}

#[test]
fn a_plain_value_without_context_inline() {
    let output = expanded("inline", "pub(crate) fn r#type(x: HashMap<String,Vec<u8>,>) -> u64 { 1 }");
    let expected = Expected {
        cfg: "",
        docs: "",
        vis: "pub(crate)",
        ident: "r#type",
        args: "(HashMap<String, Vec<u8>,>,)",
        output: "u64",
        name: "::core::concat!(::core::module_path!(), \"::\", \"type\")",
        signature: "(HashMap<String, Vec<u8>>) -> u64",
        inline: true,
        handler: "sync(
            |_context: &::farcall::__private::Call, (argument_0,): (HashMap<String, Vec<u8>,>,)|
                -> ::core::result::Result<Self::Output, ::farcall::Error> {
                ::core::result::Result::Ok(Self::run(argument_0))
            },
        )",
        run: "pub(crate) fn run(x: HashMap<String, Vec<u8>,>) -> u64 { 1 }",
    };
    assert_eq!(output, expected.text());
}

#[test]
fn nothing_in_and_nothing_out() {
    let output = expanded("", "fn ping() {}");
    let expected = Expected {
        cfg: "",
        docs: "",
        vis: "",
        ident: "ping",
        args: "()",
        output: "()",
        name: "::core::concat!(::core::module_path!(), \"::\", \"ping\")",
        signature: "() -> ()",
        inline: false,
        handler: "sync(
            |_context: &::farcall::__private::Call, (): ()|
                -> ::core::result::Result<Self::Output, ::farcall::Error> {
                { Self::run(); ::core::result::Result::Ok(()) }
            },
        )",
        run: "fn run() {}",
    };
    assert_eq!(output, expected.text());
}

#[test]
fn an_async_function_without_context_keeps_it_to_the_end() {
    let output = expanded("", "async fn rest(ms: u64) { sleep(ms).await }");
    let handler = "|context: ::farcall::__private::Call, (argument_0,): (u64,)| async move {
        let _context = context;
        { Self::run(argument_0).await; ::core::result::Result::Ok(()) }
    }";
    assert!(output.contains(&normal(handler)), "{output}");
}

#[test]
fn a_result_is_known_by_its_last_segment() {
    let signature_of = |returned: &str| {
        let output = expanded("", &format!("fn f() -> {returned} {{ body }}"));
        let at = output.find("SIGNATURE").unwrap();
        output[at..].split('"').nth(1).unwrap().to_owned()
    };
    assert_eq!(signature_of("Result<Tensor, MyError>"), "() -> Tensor");
    assert_eq!(signature_of("std::fmt::Result"), "() -> ()");
    assert_eq!(signature_of("Result<()>"), "() -> ()");
    assert_eq!(signature_of("Option<Result<u8, u8>>"), "() -> Option<Result<u8, u8>>");
    assert_eq!(signature_of("(f32,)"), "() -> (f32,)");
}

/// M2: each refusal says what to change.
#[test]
fn what_cannot_be_a_handler_is_refused_with_the_change_to_make() {
    for (item, expected) in [
        ("fn f<T>(x: T) {}", "cannot be generic; write one for each type"),
        ("fn f<'a>(x: u8) {}", "cannot be generic"),
        ("fn f() where u8: Copy {}", "needs no `where`"),
        ("unsafe fn f() {}", "make it safe"),
        ("extern \"C\" fn f() {}", "an `extern` function cannot be called"),
        ("fn f(&self) {}", "has no `self`"),
        ("fn f(self: Box<Self>) {}", "has no `self`"),
        ("fn f(cx: Call) {}", "write `cx: &Call`"),
        ("fn f(cx: &mut Call) {}", "write `cx: &Call`"),
        ("async fn f(cx: &Call) {}", "write `cx: Call`"),
        ("fn f(x: u8, cx: &Call) {}", "the context, a type named `Call`, comes first"),
        ("fn f(x: &Tensor) {}", "an argument travels between workers, so it is owned"),
        ("fn f(x: Option<(u8, &'static str)>) {}", "an argument travels between workers"),
        ("fn f(x: impl Fn()) {}", "an argument needs a type with a name"),
        ("fn f(x: Vec<impl Copy>) {}", "an argument needs a type with a name"),
        ("fn f() -> impl Copy {}", "the returned value needs a type with a name"),
        ("fn f() -> &'static str {}", "the returned value travels between workers"),
        ("fn f() -> ! {}", "write the type of the value"),
        ("fn f() -> _ {}", "write the type of the returned value out"),
        ("fn f(#[cfg(a)] x: u8) {}", "parameters take no attributes"),
        ("fn f(a: u8, b: u8, c: u8, d: u8, e: u8, f: u8, g: u8, h: u8, i: u8) {}", "at most 8 arguments"),
        ("struct S;", "expected a free function"),
        ("fn f();", "expected a free function"),
    ] {
        let error = refused("", item);
        assert!(error.contains(expected), "{item}: {error}");
    }
}

#[test]
fn options_that_make_no_sense_are_refused() {
    for (options, item, expected) in [
        ("nam = \"x\"", "fn f() {}", "there are `name = \"…\"` and `inline`"),
        ("name = \"x\", name = \"y\"", "fn f() {}", "given twice"),
        ("name = \"\"", "fn f() {}", "a name has 1 to 255 bytes"),
        ("name = \"a b\"", "fn f() {}", "a name has 1 to 255 bytes"),
        ("name = 3", "fn f() {}", "expected string literal"),
        ("inline", "async fn f() {}", "an `async fn` cannot be `inline`"),
    ] {
        let error = refused(options, item);
        assert!(error.contains(expected), "{options}: {error}");
    }
    expanded("name = \"x\", inline,", "fn f(cx: &Call, a: u8, b: u8, c: u8, d: u8, e: u8, f: u8, g: u8, h: u8) {}");
}
