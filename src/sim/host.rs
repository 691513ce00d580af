//! A simulated machine: an address, a disk, and a process with an async runtime and threads of its own. The process lives in steps of
//! simulated time; between two of them it may be killed, be stopped for a while, or lose power.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use holdfast_cluster::net::sim::Net;
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::turns::Crew;
use tokio::runtime::Runtime;
use tokio::sync::Notify;

struct Process {
    runtime: Option<Runtime>,
    crew: Arc<Crew>,
    disk: SimDisk,
    /// When it first did something, in simulated time.
    began: Option<Duration>,
    /// What its clock says has passed since then: whole milliseconds, as the runtime's clock knows no others.
    clock: Duration,
}

impl Process {
    /// What its clock has to say at a moment.
    fn clock_at(&self, now: Duration, rate: u32) -> Duration {
        let passed = now.saturating_sub(self.began.unwrap_or(now));
        Duration::from_millis((passed.as_micros() * u128::from(rate) / 1_000_000_000) as u64)
    }
}

/// A machine.
pub(super) struct Host {
    pub(super) address: IpAddr,
    pub(super) disk: SimDisk,
    net: Net,
    process: Option<Process>,
    /// Its process does nothing before this.
    pub(super) stopped_until: Duration,
    /// How fast its clock goes: millionths of its time in one of simulated time.
    pub(super) clock_rate: u32,
}

impl Host {
    pub(super) fn new(address: IpAddr, net: &Net, disk: SimDisk) -> Host {
        Host {
            address,
            disk,
            net: net.clone(),
            process: None,
            stopped_until: Duration::ZERO,
            clock_rate: 1_000_000,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Starts a process; `main` gets the disk as it sees it.
    pub(super) fn start<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        seed: u64,
        main: impl FnOnce(SimDisk) -> F,
    ) {
        assert!(self.process.is_none(), "one process at a time");
        tracing::info!(address = %self.address, "started");
        self.net.back(self.address);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime without I/O");
        let pump = Arc::new(Notify::new());
        let wake = pump.clone();
        let clock = || tokio::time::Instant::now().into_std();
        let crew = runtime.block_on(async { Crew::new(seed, clock, move || wake.notify_one()) });
        let disk = self.disk.for_process();
        let main = main(disk.clone());
        let others = crew.clone();
        runtime.spawn(async move {
            loop {
                others.run();
                let due = others.next_due();
                tokio::select! {
                    biased;
                    () = pump.notified() => {}
                    () = async {
                        match due {
                            Some(due) => tokio::time::sleep_until(due.into()).await,
                            None => std::future::pending().await,
                        }
                    } => {}
                }
            }
        });
        runtime.spawn(main);
        self.process =
            Some(Process { runtime: Some(runtime), crew, disk, began: None, clock: Duration::ZERO });
        self.stopped_until = Duration::ZERO;
    }

    /// The process does nothing for a while, as after SIGSTOP.
    pub(super) fn stop_for(&mut self, now: Duration, how_long: Duration) {
        if self.process.is_some() {
            self.stopped_until = self.stopped_until.max(now) + how_long;
            tracing::info!(address = %self.address, ?now, until = ?self.stopped_until, "stopped");
        }
    }

    /// Looks at the process from within, if it is one that could act now.
    pub(super) fn within<T>(&self, now: Duration, look: impl FnOnce() -> T) -> Option<T> {
        // Time that it has slept through comes to it before it does anything.
        let is_awake = |process: &&Process| {
            now >= self.stopped_until && process.clock == process.clock_at(now, self.clock_rate)
        };
        let process = self.process.as_ref().filter(is_awake)?;
        let _entered = process.runtime.as_ref()?.enter();
        Some(self.net.scope(self.address, || process.crew.scope(look)))
    }

    /// Lets the process live for a step of simulated time.
    ///
    /// # Errors
    /// If one of its threads panicked.
    pub(super) fn step(&mut self, now: Duration, step: Duration) -> Result<(), String> {
        self.net.deliver(self.address, now);
        let Some(process) = &mut self.process else { return Ok(()) };
        if now < self.stopped_until {
            return Ok(());
        }
        process.began.get_or_insert(now);
        let clock = process.clock_at(now + step, self.clock_rate);
        let passes = clock - std::mem::replace(&mut process.clock, clock);
        if passes.is_zero() {
            return Ok(());
        }
        let _span = tracing::info_span!("host", address = %self.address, ?now).entered();
        let (crew, runtime) = (process.crew.clone(), process.runtime.as_ref().expect("it is up"));
        self.net.scope(self.address, || {
            crew.scope(|| {
                runtime.block_on(async {
                    if passes > step {
                        tokio::time::advance(passes - step).await;
                    }
                    tokio::time::sleep(passes.min(step)).await;
                });
            });
        });
        let lag = crew.take_lag();
        if !lag.is_zero() {
            self.stop_for(now + step, lag);
        }
        match crew.panicked() {
            Some(panic) => Err(format!("a thread of {} panicked: {panic}", self.address)),
            None => Ok(()),
        }
    }

    /// The process ends without another step. Without power the machine goes too, and what was not synced may.
    pub(super) fn kill(&mut self, with_power: bool) {
        let Some(mut process) = self.process.take() else { return };
        tracing::info!(address = %self.address, with_power, "killed");
        process.disk.fence();
        process.crew.kill();
        self.net.down(self.address, with_power);
        let runtime = process.runtime.take();
        self.net.scope(self.address, || process.crew.scope(|| drop(runtime)));
        if !with_power {
            self.disk.crash();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill(true);
    }
}
