//! The kernel tells the error of a failed write-back to each open descriptor once: whoever shares one with somebody else may be told
//! nothing, or what concerns the other.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{at, body, entry, identity, options, outcome, settle, until, wait};
use holdfast_storage::disk::sim::SimDisk;
use holdfast_storage::disk::{Disk, DiskFile};
use holdfast_storage::{Log, LogIndex};

/// How far the schedule has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Stage {
    /// Nothing is held up.
    Before,
    /// The next sync of the eraser waits.
    Armed,
    /// It does.
    EraserWaits,
    /// The writer has written a batch, and its sync waits.
    WriterWaits,
    /// The eraser's sync has failed, and has taken the writer's batch with it.
    Failed,
}

#[derive(Clone)]
struct Stages(Arc<(Mutex<Stage>, Condvar)>);

impl Stages {
    fn is(&self, stage: Stage) -> bool {
        *self.0.0.lock().unwrap() == stage
    }

    fn set(&self, stage: Stage) {
        *self.0.0.lock().unwrap() = stage;
        self.0.1.notify_all();
    }

    fn wait_for(&self, stage: Stage) {
        let guard = self.0.0.lock().unwrap();
        let limit = Duration::from_secs(20);
        let (guard, _) = self.0.1.wait_timeout_while(guard, limit, |now| *now < stage).unwrap();
        assert!(*guard >= stage, "{stage:?} did not come");
    }
}

/// A disk on which the writer's and the eraser's syncs meet.
struct Meeting {
    disk: SimDisk,
    stages: Stages,
}

struct File {
    file: Arc<dyn DiskFile>,
    disk: SimDisk,
    stages: Stages,
    is_segment: bool,
}

impl Meeting {
    fn file(&self, name: &str, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        let is_segment = name.starts_with("segment-");
        Arc::new(File { file, disk: self.disk.clone(), stages: self.stages.clone(), is_segment })
    }
}

impl Disk for Meeting {
    fn name(&self) -> String {
        self.disk.name()
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(name, self.disk.open(name)?))
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(name, self.disk.create(name)?))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn sync_dir(&self) -> io::Result<()> {
        self.disk.sync_dir()
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }
}

impl DiskFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // The eraser overwrites once the intent is durable.
        if std::thread::current().name() == Some("log-eraser")
            && self.is_segment
            && self.stages.is(Stage::Armed)
        {
            self.stages.set(Stage::EraserWaits);
            self.stages.wait_for(Stage::WriterWaits);
        }
        self.file.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        match std::thread::current().name() {
            Some("log-writer") if self.stages.is(Stage::EraserWaits) => {
                self.stages.set(Stage::WriterWaits);
                self.stages.wait_for(Stage::Failed);
                self.file.sync_data()
            }
            Some("log-eraser") if self.is_segment && self.stages.is(Stage::WriterWaits) => {
                self.disk.fail_sync_in(1);
                let failed = self.file.sync_data();
                self.stages.set(Stage::Failed);
                failed
            }
            _ => self.file.sync_data(),
        }
    }
}

/// P2: the eraser's sync of a segment fails and takes a batch with it that the writer has just written there. The writer is told, and tells
/// nobody that the batch is durable.
#[test]
fn p2_whose_batch_the_erasers_sync_has_lost_is_told() {
    let disk = SimDisk::new(1);
    let stages = Stages(Arc::new((Mutex::new(Stage::Before), Condvar::new())));
    let meeting = Meeting { disk: disk.clone(), stages: stages.clone() };
    let (log, _) = Log::open(Arc::new(meeting), identity(), options()).unwrap();
    wait(&log, |done| log.append(vec![entry(at(1, 0), body(0, 9000))], done));
    until("there is a spare segment", || disk.list().is_ok_and(|names| names.len() > 2));
    // The eraser is done with the spare segment.
    settle(&log);
    stages.set(Stage::Armed);
    log.erase(LogIndex(0));
    stages.wait_for(Stage::EraserWaits);
    let told = outcome(|done| log.append(vec![entry(at(1, 1), body(1, 9000))], done));
    assert!(stages.is(Stage::Failed));
    drop(log);
    disk.crash();
    let (log, _) = Log::open(Arc::new(disk), identity(), options()).unwrap();
    assert_eq!(log.last(), Some(at(1, 0)), "the batch is lost");
    assert!(told.is_err(), "and somebody was told that it is durable");
}
