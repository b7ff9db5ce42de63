//! The `farcall` command as people and scripts use it: one binary of tests over the built program.

mod bench;
mod program;
mod serve;
