//! Reads a function and writes the struct, the registration and `run`.

use proc_macro2::{Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, format_ident, quote};
use syn::ext::IdentExt as _;
use syn::parse::Parser as _;
use syn::spanned::Spanned as _;
use syn::{Attribute, Error, FnArg, GenericArgument, ItemFn, LitStr, PathArguments, Result, ReturnType, Safety, Type};

use crate::signature;

/// Arguments beside the context: as many as the tuples that are encoded as arguments have fields.
const ARGUMENTS_MAX: usize = 8;

/// The whole attribute: `options` are what its parentheses hold, `item` what it stands on.
pub(crate) fn function(options: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let options = Options::parse(options)?;
    let span = item.span();
    let function: ItemFn = syn::parse2(item)
        .map_err(|error| Error::new(error_span(&error, span), format!("expected a free function: {error}")))?;
    let handler = Handler::read(&function, &options)?;
    Ok(handler.write(&options))
}

/// Where `error` points, or the whole item when it points past its end.
fn error_span(error: &Error, item: Span) -> Span {
    if error.to_string().contains("end of input") { item } else { error.span() }
}

/// What stands in the attribute's parentheses.
#[derive(Default)]
struct Options {
    name: Option<LitStr>,
    inline: Option<Span>,
}

impl Options {
    fn parse(tokens: TokenStream) -> Result<Self> {
        let mut options = Self::default();
        let parser = syn::meta::parser(|meta| {
            let repeated = if meta.path.is_ident("name") {
                let name: LitStr = meta.value()?.parse()?;
                check_name(&name)?;
                options.name.replace(name).is_some()
            } else if meta.path.is_ident("inline") {
                options.inline.replace(meta.path.span()).is_some()
            } else {
                return Err(meta.error("unknown option; there are `name = \"…\"` and `inline`"));
            };
            if repeated { Err(meta.error("this option is given twice")) } else { Ok(()) }
        });
        parser.parse2(tokens)?;
        Ok(options)
    }
}

fn check_name(name: &LitStr) -> Result<()> {
    const NAME_BYTES_MAX: usize = 255;
    let text = name.value();
    if text.is_empty() || text.len() > NAME_BYTES_MAX || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let message =
            format!("a name has 1 to {NAME_BYTES_MAX} bytes and no white space, such as \"weights::publish\"");
        return Err(Error::new(name.span(), message));
    }
    Ok(())
}

/// A function that passed all checks.
struct Handler<'a> {
    function: &'a ItemFn,
    has_context: bool,
    arguments: Vec<&'a Type>,
    output: Output<'a>,
}

/// What the function returns, by its syntax.
enum Output<'a> {
    Nothing,
    Value(&'a Type),
    /// A type whose last segment is `Result`; its traits say what is in it.
    Result(&'a Type),
}

impl<'a> Handler<'a> {
    fn read(function: &'a ItemFn, options: &Options) -> Result<Self> {
        check_signature(function)?;
        let is_async = function.sig.asyncness.is_some();
        if let (true, Some(inline)) = (is_async, options.inline) {
            let message =
                "an `async fn` cannot be `inline`: it may wait, and would hold up whatever the peer sends next";
            return Err(Error::new(inline, message));
        }
        let mut parameters = Vec::new();
        for input in &function.sig.inputs {
            match input {
                FnArg::Receiver(receiver) => {
                    let message = "a free function has no `self`; keep state in the agent, or pass it as an argument";
                    return Err(Error::new_spanned(receiver, message));
                }
                FnArg::Typed(parameter) => {
                    if let Some(attribute) = parameter.attrs.first() {
                        return Err(Error::new_spanned(attribute, "parameters take no attributes here"));
                    }
                    parameters.push(&*parameter.ty);
                }
            }
        }
        let has_context = match parameters.first() {
            Some(first) => is_context(first, is_async)?,
            None => false,
        };
        let arguments = parameters.split_off(usize::from(has_context));
        if let Some(extra) = arguments.get(ARGUMENTS_MAX) {
            let message = format!("at most {ARGUMENTS_MAX} arguments beside the context; put some of them in a struct");
            return Err(Error::new_spanned(extra, message));
        }
        for argument in &arguments {
            if names_call(referent(argument)) {
                return Err(Error::new_spanned(argument, "the context, a type named `Call`, comes first"));
            }
            check_owned(argument, "an argument")?;
        }
        let output = match &function.sig.output {
            ReturnType::Default => Output::Nothing,
            ReturnType::Type(_, output) => {
                check_owned(output, "the returned value")?;
                if last_segment(output).is_some_and(|segment| segment.ident == "Result") {
                    Output::Result(output)
                } else {
                    Output::Value(output)
                }
            }
        };
        Ok(Self { function, has_context, arguments, output })
    }

    fn write(&self, options: &Options) -> TokenStream {
        let ItemFn { attrs, vis, sig, block, .. } = self.function;
        let handle = &sig.ident;
        let configured: Vec<_> = attrs.iter().filter(|attr| is_cfg(attr)).collect();
        let documented: Vec<_> = attrs.iter().filter(|attr| attr.path().is_ident("doc")).collect();
        let others: Vec<_> = attrs.iter().filter(|attr| !is_cfg(attr) && !attr.path().is_ident("doc")).collect();

        let arguments = &self.arguments;
        let (output, output_text) = self.output_and_text();
        let name = match &options.name {
            Some(name) => quote!(#name),
            None => {
                let name = handle.unraw().to_string();
                quote!(::core::concat!(::core::module_path!(), "::", #name))
            }
        };
        let signature = signature::text(arguments, &output_text);
        let inline = options.inline.is_some();
        let handler = self.handler();
        let mut run = sig.clone();
        run.ident = Ident::new("run", handle.span());

        quote! {
            #(#configured)*
            #(#documented)*
            // Not `expect`: a name of one lower-case word does not always set the lint off.
            #[allow(non_camel_case_types, reason = "named after its function")]
            #[derive(Clone, Copy, Debug)]
            #vis struct #handle;

            #(#configured)*
            impl ::farcall::__private::Function for #handle {
                type Args = (#(#arguments,)*);
                type Output = #output;
                const NAME: &'static str = #name;
                const SIGNATURE: &'static str = #signature;
                const INLINE: bool = #inline;
                fn handler() -> ::farcall::__private::Handler {
                    #handler
                }
                fn cell() -> &'static ::farcall::__private::FunctionCell {
                    static CELL: ::farcall::__private::FunctionCell = ::farcall::__private::FunctionCell::new();
                    &CELL
                }
            }

            #(#configured)*
            ::farcall::__private::inventory::submit! {
                ::farcall::__private::Registration::of::<#handle>()
            }

            #(#configured)*
            impl #handle {
                /// Runs the function here, without a call.
                #(#others)*
                #vis #run #block
            }
        }
    }

    /// The type of a successful outcome, and its tokens for the signature's text.
    fn output_and_text(&self) -> (TokenStream, TokenStream) {
        match self.output {
            Output::Nothing => (quote!(()), quote!(())),
            Output::Value(value) => (quote!(#value), quote!(#value)),
            Output::Result(result) => {
                let value = match last_segment(result).map(|segment| &segment.arguments) {
                    Some(PathArguments::AngleBracketed(arguments)) => arguments.args.first(),
                    // An alias without parameters, such as `fmt::Result`, is one of `()`.
                    _ => None,
                };
                let text = match value {
                    Some(GenericArgument::Type(value)) => quote!(#value),
                    _ => quote!(()),
                };
                (quote!(<#result as ::farcall::__private::Outcome>::Value), text)
            }
        }
    }

    /// The expression that makes the `Handler`: a closure that takes the arguments apart and calls `run`.
    fn handler(&self) -> TokenStream {
        let is_async = self.function.sig.asyncness.is_some();
        let types = &self.arguments;
        // Of this macro's own hygiene, so that no name of the function's can clash.
        let names: Vec<_> = (0..types.len()).map(|index| format_ident!("argument_{index}", span = own())).collect();
        let context = Ident::new("context", own());
        let passed = self.has_context.then(|| quote!(#context,));
        let call = quote!(Self::run(#passed #(#names),*));
        let call = if is_async { quote!(#call.await) } else { call };
        let outcome = match self.output {
            Output::Nothing => quote!({ #call; ::core::result::Result::Ok(()) }),
            Output::Value(_) => quote!(::core::result::Result::Ok(#call)),
            Output::Result(_) => quote!(::farcall::__private::Outcome::into_outcome(#call)),
        };
        if is_async {
            // Kept to the end also where the function does not want it: what it holds belongs to the call.
            let kept = (!self.has_context).then(|| quote!(let _context = #context;));
            quote! {
                ::farcall::__private::Handler::future(
                    |#context: ::farcall::__private::Call, (#(#names,)*): (#(#types,)*)| async move {
                        #kept
                        #outcome
                    },
                )
            }
        } else {
            let result = quote!(::core::result::Result<Self::Output, ::farcall::Error>);
            let context = if self.has_context { context } else { Ident::new("_context", own()) };
            quote! {
                ::farcall::__private::Handler::sync(
                    |#context: &::farcall::__private::Call, (#(#names,)*): (#(#types,)*)| -> #result { #outcome },
                )
            }
        }
    }
}

fn own() -> Span {
    Span::mixed_site()
}

fn is_cfg(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
}

/// Refuses what no handler can be, whatever its parameters are.
fn check_signature(function: &ItemFn) -> Result<()> {
    let sig = &function.sig;
    if let Some(first) = sig.generics.params.first() {
        let message = "a function that is called by name cannot be generic; write one for each type";
        return Err(Error::new_spanned(first, message));
    }
    if let Some(clause) = &sig.generics.where_clause {
        return Err(Error::new_spanned(clause, "a function that is not generic needs no `where`"));
    }
    if !matches!(sig.safety, Safety::Default) {
        let message = "other workers cannot keep the promises of an `unsafe fn`; check the arguments and make it safe";
        return Err(Error::new_spanned(&sig.safety, message));
    }
    if let Some(abi) = &sig.abi {
        return Err(Error::new_spanned(abi, "an `extern` function cannot be called through an agent"));
    }
    Ok(())
}

/// Whether a first parameter is the context, and if so, of the kind that this function takes.
fn is_context(first: &Type, is_async: bool) -> Result<bool> {
    let (is_reference, is_mutable) = match first {
        Type::Reference(reference) => (true, reference.mutability.is_some()),
        _ => (false, false),
    };
    match (names_call(referent(first)), is_reference, is_async) {
        (false, ..) => Ok(false),
        (true, true, true) => {
            let message =
                "an `async fn` owns its context, since it may outlive the thread that started it: write `cx: Call`";
            Err(Error::new_spanned(first, message))
        }
        (true, false, false) => {
            let message = "a function that is not `async` borrows its context: write `cx: &Call`";
            Err(Error::new_spanned(first, message))
        }
        (true, ..) if is_mutable => Err(Error::new_spanned(first, "the context is shared: write `cx: &Call`")),
        (true, ..) => Ok(true),
    }
}

/// What a reference refers to; any other type is itself.
fn referent(ty: &Type) -> &Type {
    match ty {
        Type::Reference(reference) => &reference.elem,
        _ => ty,
    }
}

fn names_call(ty: &Type) -> bool {
    last_segment(ty).is_some_and(|segment| segment.ident == "Call")
}

/// The last segment of a type that is a path.
fn last_segment(ty: &Type) -> Option<&syn::PathSegment> {
    match ty {
        Type::Path(path) if path.qself.is_none() => path.path.segments.last(),
        Type::Group(group) => last_segment(&group.elem),
        Type::Paren(paren) => last_segment(&paren.elem),
        _ => None,
    }
}

/// Refuses types that borrow, or that only the compiler could name.
fn check_owned(ty: &Type, what: &str) -> Result<()> {
    if matches!(ty, Type::Never(_)) {
        return Err(Error::new_spanned(ty, "a call ends with a value or an error: write the type of the value"));
    }
    if let Type::Infer(_) = ty {
        return Err(Error::new_spanned(ty, format!("write the type of {what} out")));
    }
    match unowned(ty.to_token_stream()) {
        None => Ok(()),
        Some((token, "impl")) => {
            let message = format!("{what} needs a type with a name, since both workers must know it: no `impl`");
            Err(Error::new(token, message))
        }
        Some((token, _)) => {
            let message =
                format!("{what} travels between workers, so it is owned: `Tensor`, `String`, `Vec<f32>`, no borrow");
            Err(Error::new(token, message))
        }
    }
}

/// The first `&` or `impl` at any depth.
fn unowned(tokens: TokenStream) -> Option<(Span, &'static str)> {
    tokens.into_iter().find_map(|token| match token {
        TokenTree::Punct(punct) if punct.as_char() == '&' => Some((punct.span(), "&")),
        TokenTree::Ident(ident) if ident == "impl" => Some((ident.span(), "impl")),
        TokenTree::Group(group) => unowned(group.stream()),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
