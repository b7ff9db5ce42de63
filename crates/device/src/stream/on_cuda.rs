//! Streams of CUDA devices: how an operation gets to the driver, and in which order.
//!
//! Invariant S4: what the clock says is ordered was ordered: a wait is with the driver, or the host has seen its end, before the
//! operation behind it is. If the driver refuses a wait, the device is lost.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::{Edge, INLINE_WAIT_MAX, Order, Place, Stream, StreamId, Tracked};
use crate::cuda::{Context, CudaStream, Rows};
use crate::event::Lane;
use crate::progress::Progress;
use crate::{Access, Device, DeviceError, Event, Layout, Runtime, Storage, StorageMut, Tensor};

impl Stream {
    /// As [`Stream::pack`], where one end is a CUDA device.
    pub(super) fn pack_on_cuda(&self, tensor: &Tensor, device: Device) -> Result<Tensor, DeviceError> {
        let runtime = &self.0.runtime;
        let layout = tensor.layout();
        let Some(rows) = rows_of(layout) else {
            if tensor.storage().is_cuda() {
                return Err(DeviceError::Unsupported { what: "packing such a strided view", device: tensor.device() });
            }
            let packed = runtime.stream(Device::HOST)?.pack(tensor, Device::HOST)?;
            return self.pack_on_cuda(&packed, device);
        };
        let packed = layout.packed();
        let len = packed.size_bytes();
        let mut target = if device.is_host() { runtime.alloc_pinned(len)? } else { runtime.alloc(device, len)? };
        let cuda = if tensor.storage().is_cuda() { tensor.device() } else { device };
        let start = layout.byte_span().start;
        let mut last = None;
        self.through_cuda(cuda, |stream| {
            stream.copy_rows("pack", tensor.storage(), start, &mut target, rows)?;
            last = Some(stream.clone());
            Ok(())
        })?;
        Tensor::from_storage(target.freeze(last.as_ref().unwrap_or(self)), packed)
    }

    /// Has `copy` run on a stream of a CUDA device, in this stream's order: on itself if it is one, else on one that it keeps.
    pub(super) fn through_cuda(
        &self,
        device: Device,
        copy: impl FnOnce(&Self) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        if self.on_cuda().is_some() {
            return copy(self);
        }
        let copier = {
            let mut copiers = self.0.copiers.lock().unwrap_or_else(PoisonError::into_inner);
            match copiers.iter().find(|copier| copier.device() == device) {
                Some(copier) => copier.clone(),
                None => {
                    let copier = self.0.runtime.stream(device)?;
                    copiers.push(copier.clone());
                    copier
                }
            }
        };
        copier.wait(&self.record());
        copy(&copier)?;
        self.wait(&copier.record());
        Ok(())
    }

    /// Copies rows of a storage, from `start` on, to all of `target`, one of them on this stream's CUDA device.
    pub(super) fn copy_rows(
        &self,
        op: &'static str,
        source: &Storage,
        start: usize,
        target: &mut StorageMut,
        rows: Rows,
    ) -> Result<(), DeviceError> {
        let Some((tracked, cuda)) = self.on_cuda() else { return Err(self.not_cuda()) };
        if !source.is_cuda() && !target.is_cuda() && !source.is_empty() {
            return Err(DeviceError::Unsupported { what: "a copy within the host", device: self.0.device });
        }
        let (from, to) = (source.space()?, target.space_mut()?);
        self.run_on_cuda(tracked, cuda, op, &[source], target, || cuda.copy(from.offset(start), to, rows))
    }

    /// The point after what a CUDA stream was given so far, and after what it waits for that is not the driver's.
    pub(super) fn record_on_cuda(&self, tracked: &Tracked, cuda: &CudaStream, order: &mut Order) -> Event {
        // A failure fails the event, too: the device is lost then.
        let _ = self.wait_on_cuda(cuda, order);
        let mut ticket = self.0.tickets.load(Ordering::Acquire);
        if order.has_joined {
            ticket = self.0.tickets.fetch_add(1, Ordering::AcqRel) + 1;
            order.has_joined = false;
            cuda.note_submitted(ticket);
        }
        cuda.note_point(ticket);
        let event = Event::at(self.0.id, ticket, Arc::clone(&tracked.lane), order.clock.clone());
        if order.waits.is_empty() {
            return event;
        }
        let events: Vec<_> = order.waits.iter().cloned().chain([event]).collect();
        Event::all_at(self.0.id, ticket, &events, order.clock.clone(), Some(Arc::clone(&tracked.engine)))
    }

    /// Enqueues waits for other CUDA streams; what is left in `order.waits` only the host can wait for, or has failed.
    fn wait_on_cuda(&self, cuda: &CudaStream, order: &mut Order) -> Result<(), DeviceError> {
        let mut failed = None;
        order.waits.retain(|event| match event.on_cuda() {
            _ if event.is_complete() => false,
            Some((other, ticket)) if !event.is_over() => match cuda.wait_for(other, ticket) {
                Ok(()) => event.is_over() && !event.is_complete(),
                Err(error) => {
                    // What failed there is the waiting operation's failure alone.
                    let theirs = event.is_over();
                    if !theirs {
                        failed = Some(error);
                    }
                    theirs
                }
            },
            _ => true,
        });
        // The clock says that what comes next is ordered; it would not be.
        failed.map_or(Ok(()), |error| Err(cuda.give_up(&error)))
    }

    /// Enqueues one operation on a CUDA device, after all fences of its storages.
    pub(super) fn run_on_cuda(
        &self,
        tracked: &Tracked,
        cuda: &CudaStream,
        op: &'static str,
        reads: &[&Storage],
        write: &mut StorageMut,
        submit: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        cuda.context().expect_alive()?;
        let mut order = self.order();
        for storage in reads {
            self.follow(&mut order, storage.ready_event(), Edge::Fence);
        }
        for fence in write.fences() {
            self.follow(&mut order, fence, Edge::Fence);
        }
        tracked.engine.raise();
        self.wait_on_cuda(cuda, &mut order)?;
        while !order.waits.is_empty() {
            drop(order);
            self.await_others(INLINE_WAIT_MAX)?;
            order = self.order();
            // Another thread may have added to it.
            self.wait_on_cuda(cuda, &mut order)?;
        }
        let later = Access { op, stream: self.0.id, ticket: self.0.tickets.load(Ordering::Acquire) + 1 };
        let writers = reads.iter().map(|storage| (storage.writer(), true));
        let mut order = self.check(order, later, writers.chain(write.users()));
        // The order of tickets is the driver's: the lock is held, and the driver does not wait here, but for host memory that is
        // not pinned and for room in a queue of many operations.
        if !write.is_empty() || op == "delay" {
            submit()?;
        }
        let ticket = self.0.tickets.fetch_add(1, Ordering::AcqRel) + 1;
        order.has_joined = false;
        cuda.note_submitted(ticket);
        let event = Event::at(self.0.id, ticket, Arc::clone(&tracked.lane), order.clock.clone());
        drop(order);
        write.record_write(event.clone(), op);
        for storage in reads {
            storage.push_reader(event.clone(), op, Some(&tracked.engine));
        }
        Ok(())
    }

    pub(super) fn on_cuda(&self) -> Option<(&Tracked, &CudaStream)> {
        match &self.0.tracked {
            Some(tracked @ Tracked { place: Place::Cuda(cuda), .. }) => Some((tracked, cuda)),
            _ => None,
        }
    }

    fn not_cuda(&self) -> DeviceError {
        DeviceError::Unsupported { what: "work of a CUDA device", device: self.0.device }
    }
}

impl Tracked {
    pub(super) fn on_cuda(id: StreamId, runtime: &Runtime, context: &'static Context) -> Result<Self, DeviceError> {
        let engine = Arc::clone(runtime.cuda_engine());
        let progress = Progress::new(false);
        let cuda = CudaStream::lease(context, Arc::clone(&progress))?;
        engine.begin_lease(id);
        let lane = Lane { progress, engine: Some(Arc::clone(&engine)), cuda: Some(Arc::clone(&cuda)) };
        Ok(Self { engine, lane: Arc::new(lane), place: Place::Cuda(cuda) })
    }
}

/// A layout as rows of bytes at one distance from each other, which a device's copy engine moves at once.
fn rows_of(layout: &Layout) -> Option<Rows> {
    let size = layout.dtype().size_bytes();
    let total = layout.size_bytes();
    let coalesced = layout.coalesced();
    match (coalesced.shape(), coalesced.strides()) {
        _ if total == 0 || layout.is_contiguous() => Some(Rows { count: 1, len: total, source_step: total }),
        ([_], [1]) => Some(Rows { count: 1, len: total, source_step: total }),
        // Single elements, far apart: a row each.
        (&[count], &[step]) if step > 1 => Some(Rows { count, len: size, source_step: step as usize * size }),
        (&[count, len], &[step, 1]) if step > 0 && step as usize >= len => {
            Some(Rows { count, len: len * size, source_step: step as usize * size })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn only_rows_at_one_distance_are_copied_without_a_kernel() {
        let matrix = Layout::contiguous(DType::F32, &[6, 8]).unwrap();
        let rows = |layout: &Layout| rows_of(layout).map(|rows| (rows.count, rows.len, rows.source_step));
        assert_eq!(rows(&matrix), Some((1, 192, 192)));
        assert_eq!(rows(&matrix.narrow(0, 2, 3).unwrap()), Some((1, 96, 96)), "whole rows");
        assert_eq!(rows(&matrix.narrow(1, 2, 3).unwrap()), Some((6, 12, 32)));
        assert_eq!(rows(&matrix.select(1, 5).unwrap()), Some((6, 4, 32)), "a column");
        assert_eq!(rows(&matrix.narrow(0, 0, 0).unwrap()), Some((1, 0, 0)));
        assert_eq!(rows(&matrix.transpose(0, 1).unwrap()), None);
        let row = matrix.select(0, 1).unwrap();
        assert_eq!(rows(&row.broadcast_to(&[3, 8]).unwrap()), None, "repeated");
        let cube = Layout::contiguous(DType::U8, &[4, 5, 6]).unwrap();
        assert_eq!(rows(&cube.narrow(1, 1, 2).unwrap()), Some((4, 12, 30)), "coalesced first");
        assert_eq!(rows(&cube.narrow(1, 1, 2).unwrap().narrow(2, 1, 2).unwrap()), None, "two distances");
    }
}
