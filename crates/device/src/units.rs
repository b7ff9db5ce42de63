//! Sizes as people write them: `65536`, `64MiB`, `4GB`.

/// How a size may be written, for messages.
pub const BYTES: &str = "a size such as `64MiB`, `4GB` or a number of bytes";

/// Bytes of a size: a whole number, of bytes or with a unit of 1,024 (`KiB`, `MiB`, `GiB`, `TiB`) or 1,000 (`kB`, `MB`, …).
/// `None` for anything else, and for what 64 bits do not hold.
#[must_use]
pub fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic() || letter == ' ');
    let unit = match text[digits.len()..].trim_start_matches(' ') {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    // `parse` takes a sign, too.
    let is_number = digits.bytes().all(|digit| digit.is_ascii_digit());
    if is_number { digits.parse::<u64>().ok()?.checked_mul(unit) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65_536),
            ("7B", 7),
            ("64KiB", 65_536),
            ("64 MiB", 67_108_864),
            ("4GiB", 4_294_967_296),
            ("2TiB", 2_199_023_255_552),
            ("3kB", 3_000),
            ("4GB", 4_000_000_000),
        ] {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "+1", "1.5GiB", "64M", "64mib", "1 2", "16777216TiB", "18446744073709551616"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }
}
