//! What launchers tell the processes they start: torchrun, Open MPI, MPICH and others with PMI, Slurm, PMIx, Kubernetes.
//!
//! Pure: variables in, rank, size and place of the store out. They count only where `rank` is set nowhere else.
//!
//! The first launcher of [`detect`] that fits is taken: who starts others inside of it (torchrun in a Slurm job, `mpirun` in
//! one) comes before it. The store's port is not told by any. With `MASTER_PORT` it is the next one, since that one itself is
//! taken by torchrun's or torch's own store; else it is made of the job's id ([`port_of`]), so that two jobs on one host do
//! not meet. `store = ":PORT"` sets it.

use super::SettingsError;

/// Ports that [`port_of`] gives: below those that Linux gives to clients.
const PORTS: std::ops::Range<u32> = 20_000..30_000;

/// Looks up a variable.
pub(super) type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

/// A value and the variable that it comes from.
pub(super) type Told = (String, &'static str);

/// What a launcher tells.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) launcher: &'static str,
    pub(super) rank: Told,
    pub(super) world_size: Option<Told>,
    pub(super) local_rank: Option<Told>,
    /// The host of rank 0.
    host: Option<Told>,
    /// What tells this job from others on its hosts.
    job: String,
    master_port: Option<String>,
}

/// Who started this process, if it is a launcher that is known here.
pub(super) fn detect(get: Get<'_>) -> Option<Launch> {
    let first = |names: &[&'static str]| names.iter().find_map(|name| Some((get(name)?, *name)));
    let is_one = |name: &str| get(name).is_some_and(|count| count.trim() == "1");
    let launch = |launcher, rank: &[&'static str], size: &[&'static str], local: &[&'static str]| {
        Some(Launch {
            launcher,
            rank: first(rank)?,
            world_size: first(size),
            local_rank: first(local),
            host: get("MASTER_ADDR").map(|host| (host, "MASTER_ADDR")),
            job: String::new(),
            master_port: get("MASTER_PORT"),
        })
    };
    let on_this_host = |variable| Some(("127.0.0.1".to_owned(), variable));
    let same = |a, b| get(a).is_some_and(|a| Some(a) == get(b));
    // The first host of a Slurm step or job: where rank 0 runs, unless tasks are laid out otherwise.
    let slurm_host = || {
        if is_one("SLURM_STEP_NUM_NODES") || is_one("SLURM_NNODES") {
            return on_this_host("SLURM_NNODES");
        }
        let (list, name) = first(&["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"])?;
        Some((first_host(&list), name))
    };
    let job = |names: &[&'static str]| names.iter().filter_map(|name| get(name)).collect::<Vec<_>>().join("/");

    if get("WORLD_SIZE").is_some()
        && let Some(launch) = launch("torchrun", &["RANK"], &["WORLD_SIZE"], &["LOCAL_RANK"])
    {
        return Some(Launch { job: job(&["TORCHELASTIC_RUN_ID"]), ..launch });
    }
    let mpi = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"];
    if let Some(launch) = launch("Open MPI", &mpi[..1], &mpi[1..2], &mpi[2..]) {
        let local =
            same("OMPI_COMM_WORLD_LOCAL_SIZE", mpi[1]).then(|| on_this_host("OMPI_COMM_WORLD_LOCAL_SIZE")).flatten();
        let job = job(&["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID"]);
        return Some(Launch { host: launch.host.or(local).or_else(slurm_host), job, ..launch });
    }
    let slurm = &["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEPID"];
    if get("PMI_SIZE").is_some()
        && let Some(launch) = launch("PMI", &["PMI_RANK"], &["PMI_SIZE"], &["MPI_LOCALRANKID", "SLURM_LOCALID"])
    {
        let local = same("MPI_LOCALNRANKS", "PMI_SIZE").then(|| on_this_host("MPI_LOCALNRANKS")).flatten();
        return Some(Launch { host: launch.host.or(local).or_else(slurm_host), job: job(slurm), ..launch });
    }
    // Without a step it is the batch script itself, which is one process whatever the number of tasks.
    if (get("SLURM_STEP_ID").is_some() || get("SLURM_STEPID").is_some())
        && let Some(launch) =
            launch("Slurm", &["SLURM_PROCID"], &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"], &["SLURM_LOCALID"])
    {
        return Some(Launch { host: launch.host.or_else(slurm_host), job: job(slurm), ..launch });
    }
    if let Some(launch) = launch("PMIx", &["PMIX_RANK"], &[], &["PMIX_LOCAL_RANK"]) {
        return Some(Launch { host: launch.host.or_else(slurm_host), job: job(&["PMIX_NAMESPACE"]), ..launch });
    }
    launch("a Kubernetes indexed job", &["JOB_COMPLETION_INDEX"], &[], &[])
}

impl Launch {
    /// Where the store is, and which variable says so; `port` if it is set already.
    pub(super) fn store(&self, port: Option<&str>) -> Result<Told, SettingsError> {
        let missing = |why: String| {
            let remedy = format!("{why}; set it to HOST:PORT, an address of the host of rank 0 and a free port there");
            SettingsError::Missing { variable: "FARCALL_STORE", remedy }
        };
        let Some((host, variable)) = &self.host else {
            return Err(missing(format!(
                "{} does not tell where rank 0 runs, and MASTER_ADDR is not set",
                self.launcher
            )));
        };
        let port = match (port, &self.master_port) {
            (Some(port), _) => port.to_owned(),
            (None, Some(master)) => {
                let next = master.trim().parse::<u16>().ok().and_then(|port| port.checked_add(1));
                let next =
                    next.ok_or_else(|| missing(format!("MASTER_PORT={master} is followed by no port for it")))?;
                next.to_string()
            }
            (None, None) => port_of(&self.job).to_string(),
        };
        // IPv6's colons are not the port's.
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.clone() };
        Ok((format!("{host}:{port}"), variable))
    }

    /// What to do without a number of workers.
    pub(super) fn without_size(&self) -> SettingsError {
        let remedy = format!("{} does not tell how many workers there are; set it to their number", self.launcher);
        SettingsError::Missing { variable: "FARCALL_WORLD_SIZE", remedy }
    }
}

/// The first host of a list in Slurm's notation: `node[001-004,7],gpu2` begins with `node001`.
fn first_host(list: &str) -> String {
    let mut host = String::new();
    let mut rest = list;
    while let Some(at) = rest.find(['[', ',']) {
        host.push_str(&rest[..at]);
        if rest[at..].starts_with(',') {
            return host;
        }
        let (numbers, after) = rest[at + 1..].split_once(']').unwrap_or((&rest[at + 1..], ""));
        host.push_str(numbers.split([',', '-']).next().unwrap_or_default());
        rest = after;
    }
    host + rest
}

/// A port made of what tells one job from another: equal on all its workers, likely to differ between jobs (FNV-1a).
fn port_of(job: &str) -> u32 {
    let hash = job.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    PORTS.start + hash % (PORTS.end - PORTS.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Option<Launch> {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        detect(&get)
    }

    /// Launcher, rank, size, local rank and store of these variables.
    fn told(variables: &[(&str, &str)]) -> (&'static str, String, Option<String>, Option<String>, String) {
        let launch = launch(variables).expect("a launcher");
        let value = |told: &Option<Told>| told.as_ref().map(|(value, _)| value.clone());
        let store = launch.store(None).map_or_else(|error| error.to_string(), |(store, _)| store);
        (launch.launcher, launch.rank.0.clone(), value(&launch.world_size), value(&launch.local_rank), store)
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    const TORCHRUN: &[(&str, &str)] =
        &[("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];
    const SLURM: &[(&str, &str)] = &[
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "3"),
        ("SLURM_NTASKS", "16"),
        ("SLURM_LOCALID", "3"),
        ("SLURM_NNODES", "4"),
        ("SLURM_JOB_NODELIST", "node[002-005]"),
    ];

    #[test]
    fn torchrun_has_its_own_store_at_the_port_it_tells() {
        assert_eq!(told(TORCHRUN), ("torchrun", "5".into(), some("8"), some("1"), "node7:29501".into()));
        // Inside of a Slurm step, torchrun's ranks are the workers'.
        assert_eq!(told(&[SLURM, TORCHRUN].concat()).0, "torchrun");
        let v6 = [("MASTER_ADDR", "fd00::7")];
        assert_eq!(told(&[&v6, TORCHRUN].concat()).4, "[fd00::7]:29501");
        let last = told(&[&[("MASTER_PORT", "65535")], TORCHRUN].concat()).4;
        assert!(last.starts_with("FARCALL_STORE: not set; MASTER_PORT=65535 is followed by no port"), "{last}");
        assert_eq!(launch(TORCHRUN).expect("torchrun").store(Some("7")).expect("a port").0, "node7:7");
    }

    #[test]
    fn a_rank_alone_is_no_launcher() {
        assert!(launch(&[]).is_none());
        assert!(launch(&[("RANK", "1"), ("LOCAL_RANK", "1")]).is_none());
        assert!(launch(&[("PMI_RANK", "1")]).is_none());
        // A batch script has no step.
        assert!(launch(&[("SLURM_JOB_ID", "4711"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "16")]).is_none());
    }

    #[test]
    fn slurm_tells_the_first_host_and_a_port_by_job() {
        let (launcher, rank, size, local, store) = told(SLURM);
        assert_eq!((launcher, rank.as_str(), size, local), ("Slurm", "3", some("16"), some("3")));
        let port = store.strip_prefix("node002:").and_then(|port| port.parse().ok()).expect("the first host");
        assert!(PORTS.contains(&port));
        assert_ne!(told(&[&[("SLURM_JOB_ID", "4712")], SLURM].concat()).4, store, "another job meets elsewhere");
        assert_ne!(told(&[&[("SLURM_STEP_ID", "1")], SLURM].concat()).4, store, "another step, too");
        let one = told(&[&[("SLURM_NNODES", "1")], SLURM].concat()).4;
        assert!(one.starts_with("127.0.0.1:"), "{one}");
        assert_eq!(told(&[&[("SLURM_STEP_NUM_TASKS", "2")], SLURM].concat()).2, some("2"), "a step of fewer tasks");
        assert_eq!(told(&[&[("MASTER_ADDR", "head"), ("MASTER_PORT", "9")], SLURM].concat()).4, "head:10");
    }

    #[test]
    fn host_lists_begin_with_their_first_host() {
        for (list, first) in [
            ("node7", "node7"),
            ("a,b", "a"),
            ("node[001-004,7],gpu2", "node001"),
            ("node[7,9-12]", "node7"),
            ("rack[1-2]n[3-4].local", "rack1n3.local"),
            ("", ""),
            ("node[3", "node3"),
        ] {
            assert_eq!(first_host(list), first, "{list}");
        }
    }

    #[test]
    fn open_mpi_on_one_host_needs_no_address() {
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
            ("PMIX_NAMESPACE", "prterun-1"),
            ("PMIX_RANK", "2"),
        ];
        let (launcher, rank, size, local, store) = told(&mpi);
        assert_eq!((launcher, rank.as_str(), size, local), ("Open MPI", "2", some("4"), some("2")));
        assert!(store.starts_with("127.0.0.1:2"), "{store}");
        // `mpirun` inside of a Slurm job: its ranks count, the job's first host has rank 0.
        let several = [&[("OMPI_COMM_WORLD_LOCAL_SIZE", "2")], SLURM, &mpi].concat();
        assert!(told(&several).4.starts_with("node002:"));
        let nowhere = told(&[&[("OMPI_COMM_WORLD_LOCAL_SIZE", "2")], &mpi[..]].concat()).4;
        let expected =
            "FARCALL_STORE: not set; Open MPI does not tell where rank 0 runs, and MASTER_ADDR is not set; set it";
        assert!(nowhere.starts_with(expected), "{nowhere}");
    }

    #[test]
    fn pmi_pmix_and_kubernetes_tell_what_they_do() {
        let pmi = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
        let (launcher, rank, size, local, store) = told(&pmi);
        assert_eq!((launcher, rank.as_str(), size, local), ("PMI", "1", some("2"), some("1")));
        assert!(store.starts_with("127.0.0.1:2"), "{store}");

        let pmix = launch(&[("PMIX_RANK", "1"), ("MASTER_ADDR", "a")]).expect("PMIx");
        assert_eq!((pmix.launcher, pmix.world_size.is_none()), ("PMIx", true));
        assert!(
            pmix.without_size().to_string().starts_with("FARCALL_WORLD_SIZE: not set; PMIx does not tell how many")
        );

        let (launcher, rank, size, _, store) = told(&[("JOB_COMPLETION_INDEX", "3")]);
        assert_eq!((launcher, rank.as_str(), size), ("a Kubernetes indexed job", "3", None));
        assert!(store.contains("a Kubernetes indexed job does not tell where rank 0 runs"), "{store}");
    }
}
