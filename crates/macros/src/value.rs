//! Reads a struct or an enum and writes its conversions into a `Value` and back.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{format_ident, quote};
use syn::ext::IdentExt as _;
use syn::spanned::Spanned as _;
use syn::{Attribute, Data, DeriveInput, Error, Fields, GenericParam, LitStr, Result, Variant};

/// The whole derive.
pub(crate) fn derive(item: TokenStream) -> Result<TokenStream> {
    let mut input: DeriveInput = syn::parse2(item)?;
    if let Some(attribute) = input.attrs.iter().find(|attribute| is_ours(attribute)) {
        return Err(Error::new_spanned(attribute, "`value` stands on fields and variants, not on the type"));
    }
    bound(&mut input)?;
    let (into, from) = match &input.data {
        Data::Struct(data) => of_struct(&data.fields, &input.ident)?,
        Data::Enum(data) => of_enum(&data.variants.iter().collect::<Vec<_>>(), &input.ident)?,
        Data::Union(data) => {
            return Err(Error::new_spanned(data.union_token, "a union does not say which of its fields holds a value"));
        }
    };
    let ident = &input.ident;
    let (impl_generics, type_generics, clause) = input.generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #impl_generics ::core::convert::From<#ident #type_generics> for ::farcall::Value #clause {
            fn from(value: #ident #type_generics) -> Self {
                #into
            }
        }

        #[automatically_derived]
        impl #impl_generics ::farcall::FromValue for #ident #type_generics #clause {
            fn from_value(value: ::farcall::Value) -> ::core::result::Result<Self, ::farcall::ValueError> {
                #from
            }
        }

        #[automatically_derived]
        impl #impl_generics ::core::convert::TryFrom<::farcall::Value> for #ident #type_generics #clause {
            type Error = ::farcall::ValueError;
            fn try_from(value: ::farcall::Value) -> ::core::result::Result<Self, ::farcall::ValueError> {
                ::farcall::FromValue::from_value(value)
            }
        }
    })
}

/// Type parameters convert, too.
fn bound(input: &mut DeriveInput) -> Result<()> {
    for parameter in &mut input.generics.params {
        match parameter {
            GenericParam::Lifetime(lifetime) => {
                let message = "a value owns what it holds: `Tensor`, `String`, `Vec<f64>`, no borrow";
                return Err(Error::new_spanned(lifetime, message));
            }
            GenericParam::Type(parameter) => {
                parameter.bounds.push(syn::parse_quote!(::farcall::FromValue));
                parameter.bounds.push(syn::parse_quote!(::core::convert::Into<::farcall::Value>));
            }
            GenericParam::Const(_) => {}
        }
    }
    Ok(())
}

/// What `#[value(…)]` says.
#[derive(Default)]
struct Options {
    rename: Option<LitStr>,
    default: Option<Span>,
}

fn is_ours(attribute: &Attribute) -> bool {
    attribute.path().is_ident("value")
}

impl Options {
    fn read(attributes: &[Attribute]) -> Result<Self> {
        let mut options = Self::default();
        for attribute in attributes.iter().filter(|attribute| is_ours(attribute)) {
            attribute.parse_nested_meta(|meta| {
                let repeated = if meta.path.is_ident("rename") {
                    options.rename.replace(meta.value()?.parse()?).is_some()
                } else if meta.path.is_ident("default") {
                    options.default.replace(meta.path.span()).is_some()
                } else {
                    return Err(meta.error("unknown option; there are `rename = \"…\"` and `default`"));
                };
                if repeated { Err(meta.error("this option is given twice")) } else { Ok(()) }
            })?;
        }
        Ok(options)
    }

    /// The name in values.
    fn name(&self, ident: &Ident) -> String {
        self.rename.as_ref().map_or_else(|| ident.unraw().to_string(), LitStr::value)
    }
}

/// A named field: its identifier, its name in values, and whether it may be missing.
struct Field<'a> {
    ident: &'a Ident,
    name: String,
    default: bool,
}

fn named(fields: &Fields) -> Result<Vec<Field<'_>>> {
    let mut named: Vec<Field<'_>> = Vec::new();
    for field in fields {
        let Some(ident) = &field.ident else { continue };
        let options = Options::read(&field.attrs)?;
        let name = options.name(ident);
        if named.iter().any(|known| known.name == name) {
            return Err(Error::new_spanned(field, format!("two fields are named {name:?} in values")));
        }
        named.push(Field { ident, name, default: options.default.is_some() });
    }
    Ok(named)
}

/// Refuses options on fields without names.
fn check_unnamed(fields: &Fields) -> Result<()> {
    match fields.iter().flat_map(|field| &field.attrs).find(|attribute| is_ours(attribute)) {
        Some(attribute) => {
            Err(Error::new_spanned(attribute, "a field without a name takes no options: its place tells it"))
        }
        None => Ok(()),
    }
}

/// Expressions of a `value` of the type into a `Value`, and of a `value: Value` into a result of `Self`.
fn of_struct(fields: &Fields, ident: &Ident) -> Result<(TokenStream, TokenStream)> {
    let names = places(fields);
    let (pattern, into) = (pattern(fields, &names), into_value(fields, &names)?);
    Ok((quote!(let #ident #pattern = value; #into), from_value(fields, &quote!(Self))?))
}

/// The same of an enum.
fn of_enum(variants: &[&Variant], ident: &Ident) -> Result<(TokenStream, TokenStream)> {
    let (mut into, mut from, mut known) = (Vec::new(), Vec::new(), Vec::new());
    for variant in variants {
        let options = Options::read(&variant.attrs)?;
        if let Some(span) = options.default {
            return Err(Error::new(span, "`default` is for fields that may be missing"));
        }
        let name = options.name(&variant.ident);
        if known.contains(&name) {
            return Err(Error::new_spanned(variant, format!("two variants are named {name:?} in values")));
        }
        let (variant_ident, fields) = (&variant.ident, &variant.fields);
        let names = places(fields);
        let pattern = pattern(fields, &names);
        if matches!(fields, Fields::Unit) {
            into.push(quote!(#ident::#variant_ident => ::farcall::Value::from(#name),));
            from.push(
                quote!((#name, ::core::option::Option::None) => ::core::result::Result::Ok(Self::#variant_ident),),
            );
        } else {
            let inner = into_value(fields, &names)?;
            into.push(quote! {
                #ident::#variant_ident #pattern => {
                    ::farcall::Value::Dict(::std::vec![(::farcall::Value::from(#name), #inner)])
                }
            });
            let inner = from_value(fields, &quote!(Self::#variant_ident))?;
            from.push(quote! {
                (#name, ::core::option::Option::Some(value)) => {
                    (|| { #inner })().map_err(|error: ::farcall::ValueError| error.in_field(#name))
                }
            });
        }
        known.push(name);
    }
    let into = quote!(match value { #(#into)* });
    let from = quote! {
        let (name, value) = ::farcall::__private::fields::variant::<Self>(value)?;
        match (name.as_str(), value) {
            #(#from)*
            (name, _) => ::core::result::Result::Err(
                ::farcall::ValueError::unknown::<Self>("a variant, or not one with such fields,", name, &[#(#known),*]),
            ),
        }
    };
    Ok((into, from))
}

/// Identifiers for the fields, by their places.
fn places(fields: &Fields) -> Vec<Ident> {
    (0..fields.len()).map(|index| format_ident!("field_{index}", span = Span::mixed_site())).collect()
}

/// The pattern that takes the fields apart, without the path before it.
fn pattern(fields: &Fields, names: &[Ident]) -> TokenStream {
    match fields {
        Fields::Named(fields) => {
            let idents = fields.named.iter().map(|field| &field.ident);
            quote!({ #(#idents: #names),* })
        }
        Fields::Unnamed(_) => quote!((#(#names),*)),
        Fields::Unit => quote!(),
    }
}

/// The value of fields that were taken apart into `names`.
fn into_value(fields: &Fields, names: &[Ident]) -> Result<TokenStream> {
    Ok(match fields {
        Fields::Named(_) => {
            let keys = named(fields)?.into_iter().map(|field| field.name);
            quote!(::farcall::Value::Dict(::std::vec![
                #((::farcall::Value::from(#keys), ::core::convert::Into::<::farcall::Value>::into(#names))),*
            ]))
        }
        Fields::Unnamed(_) => {
            check_unnamed(fields)?;
            match names {
                // What it wraps.
                [one] => quote!(::core::convert::Into::<::farcall::Value>::into(#one)),
                _ => quote!(::farcall::Value::Tuple(
                    ::std::vec![#(::core::convert::Into::<::farcall::Value>::into(#names)),*]
                )),
            }
        }
        Fields::Unit => quote!(::farcall::Value::None),
    })
}

/// The expression that makes `path` of `value`.
fn from_value(fields: &Fields, path: &TokenStream) -> Result<TokenStream> {
    Ok(match fields {
        Fields::Named(_) => {
            let fields = named(fields)?;
            let known = fields.iter().map(|field| &field.name);
            let taken = fields.iter().map(|Field { ident, name, default }| {
                let take = if *default { quote!(take_or_default) } else { quote!(take) };
                quote!(#ident: fields.#take(#name)?)
            });
            quote! {
                let mut fields = ::farcall::__private::fields::Fields::of::<Self>(value)?;
                let made = #path { #(#taken),* };
                fields.end::<Self>(&[#(#known),*])?;
                ::core::result::Result::Ok(made)
            }
        }
        Fields::Unnamed(unnamed) if unnamed.unnamed.len() == 1 => {
            quote!(::core::result::Result::Ok(#path(::farcall::FromValue::from_value(value)?)))
        }
        Fields::Unnamed(unnamed) => {
            let (count, names) = (unnamed.unnamed.len(), places(fields));
            let indices = 0..count;
            quote! {
                let [#(#names),*] = ::farcall::__private::fields::tuple::<Self, #count>(value)?;
                ::core::result::Result::Ok(#path(#(
                    ::farcall::FromValue::from_value(#names).map_err(|error: ::farcall::ValueError| error.at(#indices))?
                ),*))
            }
        }
        Fields::Unit => quote! {
            <() as ::farcall::FromValue>::from_value(value)
                .map(|()| #path)
                .map_err(|error: ::farcall::ValueError| error.of::<Self>())
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(item: &str, expected: &str) {
        let error = derive(item.parse().expect("tokens")).expect_err(item).to_string();
        assert!(error.contains(expected), "{item}: {error}");
    }

    #[test]
    fn what_cannot_be_a_value_is_refused_with_the_change_to_make() {
        refused("union U { a: u8 }", "a union");
        refused("struct S<'a> { a: &'a str }", "no borrow");
        refused("#[value(rename = \"x\")] struct S;", "not on the type");
        refused("struct S { #[value(renam = \"x\")] a: u8 }", "there are `rename");
        refused("struct S { #[value(default, default)] a: u8 }", "given twice");
        refused("struct S { #[value(rename = \"b\")] a: u8, b: u8 }", "two fields are named \"b\"");
        refused("struct S(#[value(default)] u8);", "its place tells it");
        refused("enum E { #[value(default)] A }", "for fields that may be missing");
        refused("enum E { A, #[value(rename = \"A\")] B }", "two variants are named \"A\"");
    }

    #[test]
    fn type_parameters_are_bound() {
        let output = derive("struct S<T: Clone, const N: usize>([T; N]);".parse().expect("tokens")).expect("a derive");
        let output: syn::File = syn::parse2(output).expect("items");
        let Some(syn::Item::Impl(first)) = output.items.first() else { panic!("an impl") };
        let Some(GenericParam::Type(parameter)) = first.generics.params.first() else { panic!("a type parameter") };
        assert_eq!(parameter.bounds.len(), 3);
    }
}
