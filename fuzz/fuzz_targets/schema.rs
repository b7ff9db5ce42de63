#![no_main]

farcall_libfuzzer::fuzz!("schema");
