//! Values as people write them. Each function gives `None` for what it does not understand; the setting's kind says what it
//! would.

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use farcall_device::units;

use super::LogFormat;

/// How a duration may be written, for messages.
pub(super) const DURATION: &str = "a time such as `30s`, `400ms`, `5m` or `2h`, above 0 and at most a year";
/// Deadlines are points in time: much later ones do not exist.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

pub(super) fn number<T: FromStr>(text: &str) -> Option<T> {
    // `parse` takes a sign, too.
    text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok())?
}

pub(super) fn above_zero(text: &str) -> Option<usize> {
    number(text).filter(|number| *number > 0)
}

pub(super) fn flag(text: &str) -> Option<bool> {
    match text {
        "1" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

pub(super) fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

pub(super) fn bytes(text: &str) -> Option<u64> {
    units::parse_bytes(text)
}

pub(super) fn some_bytes(text: &str) -> Option<u64> {
    bytes(text).filter(|bytes| *bytes > 0)
}

pub(super) fn duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let amount: u64 = number(digits)?;
    let duration = match &text[digits.len()..] {
        "ms" => Duration::from_millis(amount),
        "s" => Duration::from_secs(amount),
        "m" => Duration::from_secs(amount.checked_mul(60)?),
        "h" => Duration::from_secs(amount.checked_mul(3600)?),
        _ => return None,
    };
    (!duration.is_zero() && duration <= DURATION_MAX).then_some(duration)
}

/// `HOST:PORT` or `:PORT`. Names are looked up when the store is dialed, not here.
pub(super) fn store(text: &str) -> Option<String> {
    let (_, port) = text.rsplit_once(':')?;
    number::<u16>(port)?;
    Some(text.to_owned())
}

pub(super) fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first.trim())?, number(last.trim())?);
    (first > 0 && first <= last).then_some(first..=last)
}

pub(super) fn log_format(text: &str) -> Option<LogFormat> {
    match text {
        "text" => Some(LogFormat::Text),
        "json" => Some(LogFormat::Json),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit_and_an_end() {
        for (text, ms) in
            [("400ms", 400), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000), ("8784h", 31_622_400_000)]
        {
            assert_eq!(duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "30", "s", "-1s", "+1s", "1.5s", "0s", "0ms", "1 s", "1d", "8785h", "18446744073709551615h"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn ports_are_one_or_a_range() {
        assert_eq!(ports("20000"), Some(20000..=20000));
        assert_eq!(ports("20000-20100"), Some(20000..=20100));
        assert_eq!(ports("1 - 65535"), Some(1..=65535));
        for text in ["", "0", "0-5", "5-4", "65536", "1-65536", "a-b", "1-2-3", "-1"] {
            assert_eq!(ports(text), None, "{text}");
        }
    }

    #[test]
    fn a_store_has_a_port() {
        for text in ["a:1", "127.0.0.1:0", "[::1]:29500", ":29500"] {
            assert_eq!(store(text).as_deref(), Some(text));
        }
        for text in ["", "a", "a:", "a:65536", "a:b"] {
            assert_eq!(store(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_have_no_sign_and_flags_two_values() {
        assert_eq!(number::<u32>("4294967295"), Some(u32::MAX));
        for text in ["", "-1", "+1", "4294967296", "0x1", "1.0"] {
            assert_eq!(number::<u32>(text), None, "{text}");
        }
        assert_eq!(
            ["1", "true", "0", "false", "yes", ""].map(flag),
            [Some(true), Some(true), Some(false), Some(false), None, None]
        );
        assert_eq!((above_zero("0"), above_zero("1"), some_bytes("0")), (None, Some(1), None));
    }
}
