//! Rows as comma-separated values. What is not known is empty.

use super::report::Row;

pub(crate) const HEADER: &str = "op,size_bytes,outstanding,path,calls,min_us,p50_us,p99_us,p999_us,max_us,mean_us,\
    calls_per_s,gb_per_s,wrong,limit,limit_us,ratio,spread\n";

pub(crate) fn row(row: &Row) -> String {
    let some = |value: Option<f64>| value.map(|value| format!("{value:.6}")).unwrap_or_default();
    let fields = [
        row.op.to_string(),
        row.size_bytes.to_string(),
        row.outstanding.to_string(),
        row.path.clone(),
        row.calls.to_string(),
        some(Some(row.min_us)),
        some(Some(row.p50_us)),
        some(row.p99_us),
        some(row.p999_us),
        some(Some(row.max_us)),
        some(Some(row.mean_us)),
        some(Some(row.calls_per_s)),
        some(row.gb_per_s),
        row.wrong.map(|wrong| wrong.to_string()).unwrap_or_default(),
        row.limit.as_ref().map(|limit| limit.name.clone()).unwrap_or_default(),
        some(row.limit.as_ref().map(|limit| limit.p50_us)),
        some(row.ratio),
        some(Some(row.spread())),
    ];
    fields.join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_as_many_fields_as_the_header() {
        let row = row(&crate::bench::report::tests::row(4.0));
        assert_eq!(row.matches(',').count(), HEADER.matches(',').count());
        assert!(row.starts_with("sink,8,1,tcp,10,1.000000,4.000000,,,"), "{row}");
        assert!(row.ends_with(",1,raw tcp,2.000000,2.000000,1.000000\n"), "{row}");
    }
}
