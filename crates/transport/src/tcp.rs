//! TCP sockets, and what all stream sockets have in common, as the driver and a waiting caller use them.
//!
//! Sockets stay in blocking mode; whoever must not block says so per call (`DONTWAIT`). So a caller that drives its
//! endpoint sleeps in `recv` itself, which is one system call and no hand-over.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

/// Socket buffers between processes of one host: small ones stay in cache, and were 10–20 % faster than autotuning at 16 MiB
/// (`benches`, `calls`, its raw rows). Other hosts keep the kernel's autotuning.
const LOOPBACK_BUFFER_BYTES: usize = 512 << 10;
/// How long one blocking `recv` lasts at most, so that its caller sees deadlines and closes.
pub(crate) const RECV_TICK: Duration = Duration::from_millis(100);
const LISTEN_BACKLOG: i32 = 1024;

/// What a read or write got done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Bytes(usize),
    WouldBlock,
    Ended,
}

pub(crate) fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    if address.ip().is_loopback() {
        // Accepted sockets inherit it; after the handshake it would come too late for the window.
        socket.set_recv_buffer_size(LOOPBACK_BUFFER_BYTES)?;
        socket.set_send_buffer_size(LOOPBACK_BUFFER_BYTES)?;
    }
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok(socket)
}

/// Starts to connect; the socket becomes writable once that succeeded or failed.
pub(crate) fn connect(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.ip().is_loopback() {
        socket.set_recv_buffer_size(LOOPBACK_BUFFER_BYTES)?;
        socket.set_send_buffer_size(LOOPBACK_BUFFER_BYTES)?;
    }
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(socket)
}

/// Settings of a connected socket.
pub(crate) fn prepare(socket: &Socket) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(RECV_TICK))?;
    if socket.domain()? == Domain::UNIX {
        return Ok(());
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(10)))?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(5)).with_interval(Duration::from_secs(1)).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// Whether `recv` may sleep (for [`RECV_TICK`] at most).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    No,
    Tick,
}

/// Reads into `buffer`'s spare room and gives the bytes read.
pub(crate) fn recv<'a>(
    socket: &Socket,
    buffer: &'a mut [MaybeUninit<u8>],
    wait: Wait,
) -> Result<(Progress, &'a mut [u8]), Errno> {
    match rustix::net::recv(socket.as_fd(), buffer, recv_flags(wait)) {
        Ok(((bytes, _), _)) if bytes.is_empty() => Ok((Progress::Ended, bytes)),
        Ok(((bytes, _), _)) => Ok((Progress::Bytes(bytes.len()), bytes)),
        Err(Errno::AGAIN | Errno::INTR) => Ok((Progress::WouldBlock, &mut [])),
        Err(error) => Err(error),
    }
}

/// Reads into `buffer`, which is not empty.
pub(crate) fn recv_into(socket: &Socket, buffer: &mut [u8]) -> Result<Progress, Errno> {
    match rustix::net::recv(socket.as_fd(), buffer, recv_flags(Wait::No)) {
        Ok((0, _)) => Ok(Progress::Ended),
        Ok((len, _)) => Ok(Progress::Bytes(len)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Progress::WouldBlock),
        Err(error) => Err(error),
    }
}

fn recv_flags(wait: Wait) -> RecvFlags {
    if wait == Wait::No { RecvFlags::DONTWAIT } else { RecvFlags::empty() }
}

/// Writes the start of `parts` without blocking.
pub(crate) fn send(socket: &Socket, parts: &[IoSlice<'_>]) -> Result<Progress, Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(socket.as_fd(), parts, &mut SendAncillaryBuffer::default(), flags) {
        Ok(len) => Ok(Progress::Bytes(len)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Progress::WouldBlock),
        Err(error) => Err(error),
    }
}

/// As [`send`], with a descriptor that goes with the first byte, over a Unix socket.
pub(crate) fn send_with(socket: &Socket, bytes: &[u8], descriptor: BorrowedFd<'_>) -> Result<Progress, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(socket.as_fd(), &[IoSlice::new(bytes)], &mut ancillary, flags) {
        Ok(len) => Ok(Progress::Bytes(len)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(Progress::WouldBlock),
        Err(error) => Err(error),
    }
}

/// As [`recv`], with the descriptor that came with one of the bytes: the kernel gives those of one `sendmsg` at a time. Of
/// several that were sent as one, the others are closed; so is one for which this process has no number left.
pub(crate) fn recv_with(socket: &Socket, buffer: &mut [u8], wait: Wait) -> Result<(Progress, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = recv_flags(wait) | RecvFlags::CMSG_CLOEXEC;
    let progress = match rustix::net::recvmsg(socket.as_fd(), &mut [IoSliceMut::new(buffer)], &mut ancillary, flags) {
        Ok(message) if message.bytes == 0 => Progress::Ended,
        Ok(message) => Progress::Bytes(message.bytes),
        Err(Errno::AGAIN | Errno::INTR) => return Ok((Progress::WouldBlock, None)),
        Err(error) => return Err(error),
    };
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            descriptor = descriptors.next();
        }
    }
    Ok((progress, descriptor))
}
