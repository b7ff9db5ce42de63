//! What every call must do, between agents of one process: values, layouts, sizes, handlers, order, errors.

mod attended;
mod builtins;
mod cancel;
mod derived;
mod devices;
mod digests;
mod dtypes;
mod errors;
mod handlers;
mod into;
mod landing;
mod layouts;
mod many;
mod operators;
mod order;
mod sizes;
mod slabs;
mod snapshot;
mod transports;
mod values;
mod waiting;
mod windows;
