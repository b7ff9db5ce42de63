//! Torch's own signatures, read and printed.

use farcall_schema::Schema;

/// Recorded from torch; its first lines say how.
const OPERATORS: &str = include_str!("../data/operators.txt");

fn lines() -> impl Iterator<Item = &'static str> {
    OPERATORS.lines().filter(|line| !line.starts_with('#'))
}

#[test]
fn signatures_of_torch_are_printed_byte_for_byte() {
    let mut refused = Vec::new();
    let mut count = 0;
    for line in lines() {
        match line.parse::<Schema>() {
            Ok(schema) => assert_eq!(schema.to_string(), line),
            Err(error) => refused.push(format!("{line}: {error}")),
        }
        count += 1;
    }
    println!("{count} signatures, {} refused", refused.len());
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    assert!(count > 3000, "{count} signatures are too few");
}

/// The texts without spaces where none is needed, and with some where none is printed, are the same signatures.
#[test]
fn spaces_do_not_matter() {
    for line in lines().filter(|line| !line.contains('"')) {
        let tight = line.replace(", ", ",").replace(" -> ", "->");
        let loose = ["(", ")", ",", "[", "]", "="]
            .iter()
            .fold(line.to_owned(), |text, token| text.replace(token, &format!("  {token}\n")));
        for text in [tight, loose] {
            let schema: Schema = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(schema.to_string(), line);
        }
    }
}

#[test]
fn no_two_signatures_have_one_name_and_are_the_same() {
    let mut schemas: Vec<Schema> = lines().map(|line| line.parse().expect("a signature")).collect();
    let before = schemas.len();
    schemas.dedup();
    assert_eq!(schemas.len(), before);
}

/// P1: a text that ends early, or has any one byte changed, is a signature or an error, and never a panic.
#[test]
fn cut_and_changed_signatures_are_answered() {
    for (index, line) in lines().enumerate().filter(|(index, _)| index % 16 == 0) {
        for at in (0..line.len()).filter(|at| line.is_char_boundary(*at)) {
            let _ = line[..at].parse::<Schema>();
            let other = b"()[],.*=?!|->\"\\ \n0aT"[(index + at) % 20];
            let mut changed = line.as_bytes().to_vec();
            changed[at] = other;
            if let Ok(schema) = String::from_utf8(changed).expect("ASCII").parse::<Schema>() {
                let printed = schema.to_string();
                assert_eq!(printed.parse::<Schema>().map(|again| again.to_string()), Ok(printed));
            }
        }
    }
}
