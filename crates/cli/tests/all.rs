//! The `farcall` command as people and scripts use it: one binary of tests over the built program.

mod bench;
mod doctor;
mod explain;
mod program;
mod serve;
mod weights;
