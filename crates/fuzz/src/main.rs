//! Runs mutations of the corpus against every decoder, for a time or a number of them. See `fuzz/README.md`.

#![expect(clippy::print_stdout, reason = "a command-line program: standard output is its purpose")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, panic, thread};

use farcall_fuzz::{Corpus, CountingAllocator, TARGETS, Target, Verdict, mutate};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const USAGE: &str = "usage: farcall-fuzz [OPTION…]

  --target NAME      only this decoder
  --seconds N        how long, for each decoder (default 60)
  --seed N           the first seed (default: by the clock); with --iterations 1 it repeats a failure
  --iterations N     how many seeds, instead of a time
  --jobs N           decoders at a time (default 1)
  --input FILE       this input alone; needs --target
  --write-golden     stores the golden inputs in the corpus";

/// An input that takes longer counts as a hang; most take microseconds.
const INPUT_LIMIT: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Options {
    target: Option<&'static Target>,
    seconds: Option<u64>,
    seed: Option<u64>,
    iterations: Option<u64>,
    jobs: Option<usize>,
    input: Option<PathBuf>,
    write_golden: bool,
}

fn main() -> ExitCode {
    let options = match options(env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            println!("{error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // A failure is told once, with how to repeat it.
    panic::set_hook(Box::new(|_| {}));
    let targets: Vec<&Target> =
        TARGETS.iter().filter(|one| options.target.is_none_or(|only| only.name == one.name)).collect();
    // Memory is counted by thread, so that decoders may run beside each other.
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = run(target, &options) {
                println!("{}: FAILED: {error}", target.name);
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..options.jobs.unwrap_or(1) {
            scope.spawn(work);
        }
        work();
    });
    if failed.into_inner() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text} is no number"));
        match name.as_str() {
            "--target" => {
                let value = value()?;
                let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
                let unknown = || format!("there is no target {value}; there are {}", names.join(", "));
                options.target = Some(Target::named(&value).ok_or_else(unknown)?);
            }
            "--seconds" => options.seconds = Some(number(value()?)?),
            "--seed" => options.seed = Some(number(value()?)?),
            "--iterations" => options.iterations = Some(number(value()?)?),
            "--jobs" => options.jobs = Some(number(value()?)? as usize),
            "--input" => options.input = Some(value()?.into()),
            "--write-golden" => options.write_golden = true,
            other => return Err(format!("{other} is no option")),
        }
    }
    if options.input.is_some() && options.target.is_none() {
        return Err("--input needs --target".to_owned());
    }
    Ok(options)
}

fn run(target: &Target, options: &Options) -> Result<(), String> {
    if options.write_golden {
        let count = Corpus::write_golden(target).map_err(|error| error.to_string())?;
        println!("{:<12} {count} golden inputs", target.name);
        return Ok(());
    }
    if let Some(path) = &options.input {
        let input = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let Verdict { outcome, peak_bytes, took } = target.judge(&input);
        let decoded = outcome?;
        println!("{}: decodes: {decoded}, {peak_bytes} bytes held, {took:?}", target.name);
        return Ok(());
    }
    let corpus = Corpus::load(target).map_err(|error| error.to_string())?;
    let mut tally = Tally::default();
    for (name, input) in corpus.inputs() {
        tally.add(target, input).map_err(|why| format!("the corpus's {name}: {why}"))?;
    }
    // Warm by now: the first use of a thread's own things is not an input's doing.
    let first = options.seed.unwrap_or_else(by_the_clock);
    let start = Instant::now();
    let time = Duration::from_secs(options.seconds.unwrap_or(60));
    let mut count = 0;
    while options.iterations.map_or_else(|| start.elapsed() < time, |iterations| count < iterations) {
        let seed = first.wrapping_add(count);
        let input = mutate(target, &corpus, seed);
        tally.add(target, &input).map_err(|why| {
            let kept = keep(target, seed, &input);
            let repeat = format!("farcall-fuzz --target {} --seed {seed} --iterations 1", target.name);
            format!("seed {seed}: {why}\n  input: {kept}\n  repeat with: {repeat}")
        })?;
        count += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{:<12} {:>4} stored inputs, {count} mutations from seed {first} in {seconds:.1} s: {:.0}/s, {:.1} % decode, \
         {} KiB held at most, slowest {:.1} ms",
        target.name,
        corpus.inputs().len(),
        count as f64 / seconds,
        100.0 * tally.decoded as f64 / tally.judged.max(1) as f64,
        tally.peak_bytes.div_ceil(1024),
        tally.slowest.as_secs_f64() * 1e3,
    );
    Ok(())
}

#[derive(Default)]
struct Tally {
    judged: u64,
    decoded: u64,
    peak_bytes: usize,
    slowest: Duration,
}

impl Tally {
    fn add(&mut self, target: &Target, input: &[u8]) -> Result<(), String> {
        let Verdict { outcome, peak_bytes, took } = target.judge(input);
        let decoded = outcome?;
        if took > INPUT_LIMIT {
            return Err(format!("an input of {} bytes took {took:?}", input.len()));
        }
        self.judged += 1;
        self.decoded += u64::from(decoded);
        self.peak_bytes = self.peak_bytes.max(peak_bytes);
        self.slowest = self.slowest.max(took);
        Ok(())
    }
}

fn by_the_clock() -> u64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64)
}

/// Where a failing input was put: the seed repeats it only with the same corpus.
fn keep(target: &Target, seed: u64, input: &[u8]) -> String {
    let path = env::temp_dir().join(format!("farcall-fuzz-{}-{seed}", target.name));
    match fs::write(&path, input) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("{error}; {input:02x?}"),
    }
}
