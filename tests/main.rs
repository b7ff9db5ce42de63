//! The integration tests, one binary: what calls must do (`conformance`), what no peer may do (`hostile`), what happens
//! between real processes (`processes`), and what must hold on a simulated network (`sim`).
//!
//! `harness.rs` makes groups and bounds every test in time; `functions.rs` is what workers serve, here and in the program
//! of `worker.rs`.

mod conformance;
mod foreign;
mod functions;
mod harness;
mod hostile;
mod processes;
mod sim;
