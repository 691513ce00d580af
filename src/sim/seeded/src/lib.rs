//! getrandom(2) by a seed, on threads that ask for it; on all others it is the system's. A process that links this crate has it in the
//! place of the C library's, which allows that; so hash tables, election timeouts and all else that draws its chance from the system
//! follow the seed, without a word of it in the product.

use std::cell::Cell;

thread_local! {
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on what is random on this thread follows from `seed`. A thread that has drawn some before keeps what it made of that.
pub fn follow(seed: u64) {
    SEED.set(Some(seed));
}

fn fill(octets: &mut [u8], flags: u32) -> Option<usize> {
    let Some(mut seed) = SEED.try_with(Cell::get).ok().flatten() else {
        let flags = rustix::rand::GetRandomFlags::from_bits_retain(flags);
        return rustix::rand::getrandom(octets, flags).ok();
    };
    for chunk in octets.chunks_mut(8) {
        // splitmix64 (Steele et al., OOPSLA'14).
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..chunk.len()]);
    }
    SEED.set(Some(seed));
    Some(octets.len())
}

/// As getrandom(2).
#[expect(unsafe_code, reason = "the signature is the C library's")]
#[unsafe(no_mangle)]
extern "C" fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize {
    if length == 0 {
        return 0;
    }
    // SAFETY: getrandom(2) is called with `length` octets of the caller's own at `buffer`; zeroed first, so none is uninitialised.
    let octets = unsafe {
        buffer.write_bytes(0, length);
        std::slice::from_raw_parts_mut(buffer, length)
    };
    fill(octets, flags).map_or(-1, |filled| filled as isize)
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, RandomState};

    /// Drawn on a thread of its own, as a thread keeps what it drew first.
    fn drawn(seed: Option<u64>) -> u64 {
        let draw = move || {
            seed.into_iter().for_each(super::follow);
            RandomState::new().hash_one(1)
        };
        std::thread::spawn(draw).join().expect("it does not panic")
    }

    #[test]
    fn what_is_random_follows_the_seed() {
        assert_eq!(drawn(Some(1)), drawn(Some(1)));
        assert_ne!(drawn(Some(1)), drawn(Some(2)));
        assert_ne!(drawn(None), drawn(None));
    }
}
