//! Finds the storages inside a value, so that its readiness can be told.

use std::collections::{BTreeMap, HashMap};

use crate::{DType, Device, Storage, Tensor};

/// A value whose storages can be listed. A type without any does nothing in `visit`.
///
/// A storage that is left out is not waited for: READY would not hold for it.
pub trait Storages {
    /// Calls `visitor` for each storage inside, once or more often.
    fn visit(&self, visitor: &mut dyn FnMut(&Storage));
}

impl Storages for Storage {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        visitor(self);
    }
}

impl Storages for Tensor {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        visitor(self.storage());
    }
}

macro_rules! without_storages {
    ($($type:ty),* $(,)?) => {$(
        impl Storages for $type {
            fn visit(&self, _: &mut dyn FnMut(&Storage)) {}
        }
    )*};
}

without_storages! {
    (), bool, char, u8, i8, u16, i16, u32, i32, u64, i64, u128, i128, usize, isize, f32, f64, half::f16, half::bf16,
    String, str, std::time::Duration, DType, Device,
}

impl<T: Storages + ?Sized> Storages for &T {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        (**self).visit(visitor);
    }
}

impl<T: Storages + ?Sized> Storages for Box<T> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        (**self).visit(visitor);
    }
}

impl<T: Storages + ?Sized> Storages for std::sync::Arc<T> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        (**self).visit(visitor);
    }
}

impl<T: Storages> Storages for Option<T> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        if let Some(value) = self {
            value.visit(visitor);
        }
    }
}

impl<T: Storages, E: Storages> Storages for Result<T, E> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        match self {
            Ok(value) => value.visit(visitor),
            Err(error) => error.visit(visitor),
        }
    }
}

impl<T: Storages> Storages for [T] {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        for value in self {
            value.visit(visitor);
        }
    }
}

impl<T: Storages, const N: usize> Storages for [T; N] {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        self.as_slice().visit(visitor);
    }
}

impl<T: Storages> Storages for Vec<T> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        self.as_slice().visit(visitor);
    }
}

impl<K: Storages, V: Storages, S> Storages for HashMap<K, V, S> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        for (key, value) in self {
            key.visit(visitor);
            value.visit(visitor);
        }
    }
}

impl<K: Storages, V: Storages> Storages for BTreeMap<K, V> {
    fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
        for (key, value) in self {
            key.visit(visitor);
            value.visit(visitor);
        }
    }
}

macro_rules! tuples {
    ($($name:ident)*) => {
        impl<$($name: Storages),*> Storages for ($($name,)*) {
            fn visit(&self, visitor: &mut dyn FnMut(&Storage)) {
                #[expect(non_snake_case, reason = "type names name the fields too")]
                let ($($name,)*) = self;
                $($name.visit(visitor);)*
            }
        }
    };
}

tuples!(A);
tuples!(A B);
tuples!(A B C);
tuples!(A B C D);
tuples!(A B C D E);
tuples!(A B C D E F);
tuples!(A B C D E F G);
tuples!(A B C D E F G H);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_storage_inside_is_found() {
        let tensor = |mark: u8| Tensor::full(mark, &[1]).unwrap();
        let map: HashMap<String, Tensor> = [("a".to_owned(), tensor(6))].into();
        let tree: BTreeMap<u8, Option<Tensor>> = [(1, Some(tensor(7))), (2, None)].into();
        let value = (
            vec![tensor(1), tensor(2)],
            Box::new([tensor(3)]),
            (4, "text".to_owned(), tensor(4).storage().clone()),
            map,
            tree,
            (),
        );
        let mut seen = Vec::new();
        value.visit(&mut |storage| seen.push(storage.as_bytes().unwrap()[0]));
        seen.sort_unstable();
        assert_eq!(seen, [1, 2, 3, 4, 6, 7]);
    }
}
