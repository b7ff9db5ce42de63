//! Optimisers: one kernel steps many parameters and their state in place.
//!
//! Results are those of torch's `SGD`, `Adam` and `AdamW`, in the same order of operations, without FMA. State of half-precision
//! parameters is kept and computed in `f32`, which torch rounds to the parameter's dtype.

use farcall_device::{DType, Param, Storage, StorageMut, Stream, Tensor};
use rayon::prelude::*;

use crate::OpError;
use crate::convert::{Buffer, Cast};
use crate::elementwise::unsupported;
use crate::fill::full;
use crate::kernel::{BLOCK, CHUNK, Input, PARALLEL_MIN};
use crate::promote::compute_dtype;

/// Stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Of a step.
    pub learning_rate: f64,
    /// Share of the last direction that is kept; 0 for none, and no state.
    pub momentum: f64,
    /// Share of the gradient that is left out of the direction.
    pub dampening: f64,
    /// Share of the parameter that is added to its gradient.
    pub weight_decay: f64,
    /// Whether the gradient is taken where the momentum leads.
    pub nesterov: bool,
}

impl Sgd {
    /// Plain descent.
    #[must_use]
    pub fn new(learning_rate: f64) -> Self {
        Self { learning_rate, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

/// Adam; with decay apart from the gradient it is AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// Of a step.
    pub learning_rate: f64,
    /// Shares of the means of the gradient and of its square that are kept.
    pub betas: (f64, f64),
    /// What keeps the denominator from 0.
    pub epsilon: f64,
    /// Share of the parameter that decays.
    pub weight_decay: f64,
    /// Whether it decays by itself (AdamW), and not by way of its gradient.
    pub decoupled: bool,
}

impl Adam {
    /// Adam with torch's defaults.
    #[must_use]
    pub fn new(learning_rate: f64) -> Self {
        Self { learning_rate, betas: (0.9, 0.999), epsilon: 1e-8, weight_decay: 0.0, decoupled: false }
    }

    /// AdamW with torch's defaults.
    #[must_use]
    pub fn decoupled(learning_rate: f64) -> Self {
        Self { weight_decay: 0.01, decoupled: true, ..Self::new(learning_rate) }
    }
}

/// How parameters step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// By [`Sgd`].
    Sgd(Sgd),
    /// By [`Adam`].
    Adam(Adam),
}

impl From<Sgd> for Rule {
    fn from(rule: Sgd) -> Self {
        Self::Sgd(rule)
    }
}

impl From<Adam> for Rule {
    fn from(rule: Adam) -> Self {
        Self::Adam(rule)
    }
}

impl Rule {
    /// Tensors of state that each parameter has.
    fn states(&self) -> usize {
        match self {
            Self::Sgd(sgd) => usize::from(sgd.momentum != 0.0),
            Self::Adam(_) => 2,
        }
    }
}

/// Parameters with the rule by which they step, and its state.
///
/// ```
/// use farcall_device::{Device, Param, Runtime, Tensor};
/// use farcall_ops::{Optimizer, Sgd};
///
/// let weights = Param::new(Tensor::from_slice(&[1.0_f32, 2.0], &[2])?);
/// let mut optimizer = Optimizer::new(vec![weights.clone()], Sgd::new(0.5));
/// let grad = Tensor::from_slice(&[2.0_f32, -2.0], &[2])?;
/// let stream = Runtime::global().stream(Device::HOST)?;
/// optimizer.step(&[Some(grad)], &stream)?;
/// # weights.value().storage().ready_event().block(std::time::Duration::from_secs(9))?;
/// assert_eq!(weights.value().as_slice::<f32>()?, [0.0, 3.0]);
/// # Ok::<(), farcall_ops::OpError>(())
/// ```
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    slots: Vec<Slot>,
}

/// One parameter.
#[derive(Debug)]
struct Slot {
    param: Param,
    states: Vec<Param>,
    /// Steps that it has taken.
    steps: u32,
}

impl Optimizer {
    /// An optimiser of `params`; state is made at a parameter's first step.
    #[must_use]
    pub fn new(params: Vec<Param>, rule: impl Into<Rule>) -> Self {
        let slots = params.into_iter().map(|param| Slot { param, states: Vec::new(), steps: 0 }).collect();
        Self { rule: rule.into(), slots }
    }

    /// The parameters, in their order.
    pub fn params(&self) -> impl Iterator<Item = &Param> {
        self.slots.iter().map(|slot| &slot.param)
    }

    /// The rule, to be changed between steps, such as its learning rate.
    pub fn rule_mut(&mut self) -> &mut Rule {
        &mut self.rule
    }

    /// One step of all parameters that have a gradient, in one kernel.
    ///
    /// # Shapes and dtypes
    /// Each gradient has its parameter's shape and any real dtype.
    /// # Errors
    /// [`OpError::Shapes`], [`OpError::DTypes`], also for a number of gradients that is not that of parameters; [`OpError::Device`]. No
    /// parameter has stepped then, unless the device failed in the middle.
    /// # Cost
    /// One pass over parameters, gradients and state. A parameter whose last value is held elsewhere is copied first.
    pub fn step(&mut self, grads: &[Option<Tensor>], stream: &Stream) -> Result<(), OpError> {
        let op = "optimizer";
        if grads.len() != self.slots.len() {
            let rule = "there is a gradient, or none, for each parameter";
            let shapes = grads.iter().flatten().map(|grad| grad.shape().to_vec()).collect();
            return Err(OpError::Shapes { op, shapes, rule });
        }
        let mut stepping = Vec::new();
        for (slot, grad) in self.slots.iter_mut().zip(grads) {
            let Some(grad) = grad else { continue };
            stepping.push((slot.prepare(op, grad, self.rule.states(), stream)?, grad));
        }
        let width = 1 + self.rule.states();
        let cells: Vec<&Param> =
            stepping.iter().flat_map(|(slot, _)| [&slot.param].into_iter().chain(&slot.states)).collect();
        let mut written = Param::write_all(&cells, stream)?;
        let mut writes: Vec<&mut StorageMut> = written.iter_mut().map(|cell| cell.tensor_mut().storage_mut()).collect();
        let reads: Vec<&Storage> = stepping.iter().map(|(_, grad)| grad.storage()).collect();
        let jobs: Vec<Job> =
            stepping.iter().enumerate().map(|(read, (slot, grad))| Job::new(read, slot, grad, self.rule)).collect();
        stream.launch_many(op, &reads, &mut writes, move |reads, writes| {
            run(&jobs, width, reads, writes);
            Ok(())
        })?;
        drop(written);
        for (slot, grad) in self.slots.iter_mut().zip(grads) {
            slot.steps += u32::from(grad.is_some());
        }
        Ok(())
    }
}

impl Slot {
    /// Checks a gradient, and makes the state of a first step.
    fn prepare(&mut self, op: &'static str, grad: &Tensor, states: usize, stream: &Stream) -> Result<&Self, OpError> {
        let param = &self.param;
        if grad.shape() != param.shape() {
            let shapes = vec![param.shape().to_vec(), grad.shape().to_vec()];
            return Err(OpError::Shapes { op, shapes, rule: "a gradient has its parameter's shape" });
        }
        let compute = compute_dtype(param.dtype()).filter(|_| param.dtype().is_float() && grad.dtype().is_float());
        let Some(compute) = compute.filter(|_| compute_dtype(grad.dtype()).is_some()) else {
            return Err(unsupported(op, &[grad.into()]));
        };
        while self.states.len() < states {
            self.states.push(Param::new(full(self.param.shape(), 0, compute, stream)?));
        }
        self.states.truncate(states);
        Ok(self)
    }
}

/// What the kernel does with one parameter.
struct Job {
    grad: Input,
    dtype: DType,
    compute: DType,
    coefficients: Coefficients,
}

/// The numbers of a step.
#[derive(Clone, Copy)]
enum Coefficients {
    Sgd { rule: Sgd, is_first: bool },
    Adam { rule: Adam, step_size: f64, root_correction: f64 },
}

impl Job {
    fn new(read: usize, slot: &Slot, grad: &Tensor, rule: Rule) -> Self {
        let dtype = slot.param.dtype();
        let compute = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let coefficients = match rule {
            Rule::Sgd(rule) => Coefficients::Sgd { rule, is_first: slot.steps == 0 },
            Rule::Adam(rule) => {
                let step = f64::from(slot.steps + 1);
                let corrections = (1.0 - rule.betas.0.powf(step), 1.0 - rule.betas.1.powf(step));
                Coefficients::Adam {
                    rule,
                    step_size: rule.learning_rate / corrections.0,
                    root_correction: corrections.1.sqrt(),
                }
            }
        };
        Self { grad: Input::new(read, grad.layout(), compute), dtype, compute, coefficients }
    }
}

/// A chunk of one parameter and its state.
struct Task<'a> {
    job: &'a Job,
    start: usize,
    param: &'a mut [u8],
    states: Vec<&'a mut [u8]>,
}

fn run(jobs: &[Job], width: usize, reads: &[&[u8]], writes: &mut [&mut [u8]]) {
    let mut tasks = Vec::new();
    for (job, cells) in jobs.iter().zip(writes.chunks_mut(width)) {
        let [param, states @ ..] = cells else { continue };
        let (size, wide) = (job.dtype.size_bytes(), job.compute.size_bytes());
        let mut states: Vec<_> = states.iter_mut().map(|state| state.chunks_mut(CHUNK * wide)).collect();
        for (index, param) in param.chunks_mut(CHUNK * size).enumerate() {
            let states = states.iter_mut().filter_map(Iterator::next).collect();
            tasks.push(Task { job, start: index * CHUNK, param, states });
        }
    }
    let elements: usize = tasks.iter().map(|task| task.param.len() / task.job.dtype.size_bytes()).sum();
    if elements >= PARALLEL_MIN {
        tasks.into_par_iter().for_each(|task| task.run(reads));
    } else {
        tasks.into_iter().for_each(|task| task.run(reads));
    }
}

impl Task<'_> {
    fn run(self, reads: &[&[u8]]) {
        if self.job.compute == DType::F64 { self.run_in::<f64>(reads) } else { self.run_in::<f32>(reads) }
    }

    fn run_in<T: Real>(mut self, reads: &[&[u8]]) {
        let Job { grad, dtype, compute, coefficients } = self.job;
        let (load, store) = (Cast::between(*dtype, *compute), Cast::between(*compute, *dtype));
        let mut grads = grad.loader(reads);
        let (mut wide, mut scratch) = (Buffer::default(), <[Buffer; 2]>::default());
        for (index, block) in self.param.chunks_mut(BLOCK * dtype.size_bytes()).enumerate() {
            let (first, len) = (index * BLOCK, block.len() / dtype.size_bytes());
            let grad = bytemuck::cast_slice::<u8, T>(grads.load(self.start + first, len));
            let mut states =
                self.states.iter_mut().map(|state| &mut bytemuck::cast_slice_mut::<u8, T>(state)[first..first + len]);
            let (one, two) = (states.next(), states.next());
            if load.is_none() {
                T::step(coefficients, bytemuck::cast_slice_mut(block), grad, one, two);
            } else {
                let param = wide.bytes(len * compute.size_bytes());
                load.run(block, param, &mut scratch, len);
                T::step(coefficients, bytemuck::cast_slice_mut(param), grad, one, two);
                store.run(param, block, &mut scratch, len);
            }
        }
    }
}

/// The types that steps are computed in.
trait Real: bytemuck::Pod {
    /// Steps a block.
    fn step(
        by: &Coefficients,
        param: &mut [Self],
        grad: &[Self],
        first: Option<&mut [Self]>,
        second: Option<&mut [Self]>,
    );
}

macro_rules! reals {
    ($($type:ty),*) => {$(
        impl Real for $type {
            fn step(
                by: &Coefficients,
                param: &mut [Self],
                grad: &[Self],
                first: Option<&mut [Self]>,
                second: Option<&mut [Self]>,
            ) {
                match (*by, first, second) {
                    (Coefficients::Sgd { rule, .. }, None, _) => {
                        let (decay, rate) = (rule.weight_decay as $type, rule.learning_rate as $type);
                        for (p, g) in param.iter_mut().zip(grad) {
                            *p -= rate * (g + decay * *p);
                        }
                    }
                    (Coefficients::Sgd { rule, is_first }, Some(direction), _) => {
                        let (decay, rate) = (rule.weight_decay as $type, rule.learning_rate as $type);
                        let (keep, take) = (rule.momentum as $type, (1.0 - rule.dampening) as $type);
                        for ((p, g), d) in param.iter_mut().zip(grad).zip(direction) {
                            let g = g + decay * *p;
                            *d = if is_first { g } else { keep * *d + take * g };
                            let step = if rule.nesterov { g + keep * *d } else { *d };
                            *p -= rate * step;
                        }
                    }
                    (Coefficients::Adam { rule, step_size, root_correction }, Some(mean), Some(square)) => {
                        let shrink = if rule.decoupled { 1.0 - rule.learning_rate * rule.weight_decay } else { 1.0 };
                        let decay = if rule.decoupled { 0.0 } else { rule.weight_decay } as $type;
                        let (shrink, epsilon) = (shrink as $type, rule.epsilon as $type);
                        let (take_mean, keep) = ((1.0 - rule.betas.0) as $type, rule.betas.1 as $type);
                        let take = (1.0 - rule.betas.1) as $type;
                        let (rate, root) = (step_size as $type, root_correction as $type);
                        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(mean).zip(square) {
                            let shrunk = *p * shrink;
                            let g = g + decay * shrunk;
                            *m += (g - *m) * take_mean;
                            *v = *v * keep + take * (g * g);
                            *p = shrunk - rate * (*m / (v.sqrt() / root + epsilon));
                        }
                    }
                    (Coefficients::Adam { .. }, ..) => unreachable!("Adam has two states"),
                }
            }
        }
    )*};
}

reals!(f32, f64);
