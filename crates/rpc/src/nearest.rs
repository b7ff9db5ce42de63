//! The known name most like one that is not known, for error messages.

/// Longer names get no suggestion: comparing costs their length times that of each known name.
const NEAREST_BYTES_MAX: usize = 256;
/// As many slips as a suggestion may be away.
const DISTANCE_MAX: usize = 3;

/// The one of `known` most like `name`, if any is close: by spelling, or by its last part after `::` or `.`.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > NEAREST_BYTES_MAX {
        return None;
    }
    let last = |name: &str| name.rsplit([':', '.']).next().map(str::to_owned);
    let by_distance = |known: &&str| (last(known) != last(name), distance(known, name), (*known).to_owned());
    let best = known.into_iter().min_by_key(by_distance)?;
    (last(best) == last(name) || distance(best, name) <= DISTANCE_MAX).then_some(best)
}

/// So many names may be suggested.
const NEAREST_MAX: usize = 5;

/// The few of `known` most like `name`, nearest first, none that [`nearest`] would not give alone.
pub(crate) fn nearest_few<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut left: Vec<_> = known.into_iter().collect();
    let mut found = Vec::new();
    while found.len() < NEAREST_MAX
        && let Some(next) = nearest(name, left.iter().copied())
    {
        found.push(next);
        left.retain(|other| *other != next);
    }
    found
}

/// Levenshtein's distance, on bytes; names are short.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let insert_or_delete = row[j].min(row[j + 1]) + 1;
            diagonal = std::mem::replace(&mut row[j + 1], insert_or_delete.min(diagonal + usize::from(x != y)));
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_by_spelling_or_by_its_last_part() {
        let known = ["math::double", "limits.requests", "FARCALL_RANK"];
        for (name, expected) in [
            ("math::duoble", Some("math::double")),
            ("other::module::double", Some("math::double")),
            ("requests", Some("limits.requests")),
            ("FARCALL_RNAK", Some("FARCALL_RANK")),
            ("completely::else", None),
            ("", None),
        ] {
            assert_eq!(nearest(name, known), expected, "{name}");
        }
        assert_eq!(nearest(&"x".repeat(257), ["x"]), None);
        assert_eq!(nearest("a", []), None);
    }

    #[test]
    fn distances_computed_by_hand() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("same", "same"), 0);
    }
}
