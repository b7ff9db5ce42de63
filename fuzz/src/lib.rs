//! One line a target: [`fuzz!`] gives libFuzzer the check of that name, with memory counted.

pub use farcall_fuzz::{CountingAllocator, Target};
pub use libfuzzer_sys;

/// The program of the decoder of this name.
#[macro_export]
macro_rules! fuzz {
    ($name:literal) => {
        #[global_allocator]
        static ALLOCATOR: $crate::CountingAllocator = $crate::CountingAllocator;

        $crate::libfuzzer_sys::fuzz_target!(|input: &[u8]| -> $crate::libfuzzer_sys::Corpus {
            let target = $crate::Target::named($name).expect("a target of this name");
            target.expect_sound(input);
            $crate::libfuzzer_sys::Corpus::Keep
        });
    };
}
