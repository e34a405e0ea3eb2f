//! The KV cache: pages of [`PAGE_TOKENS`] tokens, all layers of a page together, counted by who uses them. One page more,
//! the last, is nobody's: padding of decode steps is written to it ([`super::graphs`]).
//!
//! What must stay true: the cache never holds more pages than it was made for; a page that several chains use is
//! written by none of them; what was never written holds zeros (attention multiplies it by probability 0, and a NaN
//! would survive that). Memory of the operating system follows use: pages are handed out from the first.

use agentfly_c10d::ops::{PAGE_TOKENS, page_numbers};
use tch::{Device, Kind, Tensor};

use crate::model::{ModelConfig, ModelError};

/// A page's number.
pub(crate) type Page = usize;

#[derive(Debug)]
pub(crate) struct PagePool {
    layers: i64,
    kv_heads: i64,
    head_dim: i64,
    capacity: usize,
    /// `[capacity + 1, layers, numbers]`; none until the first use and after `clear`.
    all: Option<Tensor>,
    /// How many chains use each page that was ever handed out.
    users: Vec<u32>,
    free: Vec<Page>,
}

/// Pages that hold this many tokens.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

impl PagePool {
    pub(crate) fn new(model: &ModelConfig, capacity: usize) -> Self {
        Self {
            layers: model.layers,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            capacity,
            all: None,
            users: Vec::new(),
            free: Vec::new(),
        }
    }

    /// The pages, and the one of padding, for the model. None before [`Self::prepare`].
    pub(crate) fn tensor(&self) -> Result<&Tensor, ModelError> {
        self.all.as_ref().ok_or_else(|| ModelError::Input {
            what: "KV cache",
            got: "no memory for it yet".to_owned(),
            needed: format!("{} pages", self.capacity),
        })
    }

    /// Takes the memory, where that was not done yet.
    pub(crate) fn prepare(&mut self, kind: Kind, device: Device) -> Result<(), ModelError> {
        if self.all.is_none() {
            let like = Tensor::f_zeros([1], (kind, device))?;
            let numbers = self.kv_heads * page_numbers(&like, self.head_dim)?;
            let shape = [self.capacity as i64 + 1, self.layers, numbers];
            self.all = Some(Tensor::f_empty(shape, (kind, device))?);
        }
        Ok(())
    }

    /// Pages that can be had without taking one from a chain.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.capacity - self.users.len()
    }

    /// Pages some chain uses.
    pub(crate) fn used(&self) -> usize {
        self.capacity - self.available()
    }

    /// A page of zeros with one user, or none when all are used.
    pub(crate) fn take(&mut self) -> Result<Option<Page>, ModelError> {
        let page = match self.free.pop() {
            Some(page) => page,
            None if self.users.len() < self.capacity => {
                self.users.push(0);
                self.users.len() - 1
            }
            None => return Ok(None),
        };
        self.users[page] = 1;
        let _same = self.tensor()?.f_get(page as i64)?.f_zero_()?;
        Ok(Some(page))
    }

    /// Counts one more user.
    pub(crate) fn share(&mut self, page: Page) {
        self.users[page] += 1;
    }

    /// Whether another chain uses the page, too.
    pub(crate) fn is_shared(&self, page: Page) -> bool {
        self.users[page] > 1
    }

    /// Counts one user less.
    pub(crate) fn give_back(&mut self, page: Page) {
        self.users[page] -= 1;
        if self.users[page] == 0 {
            self.free.push(page);
        }
    }

    /// Copies a page's content.
    pub(crate) fn copy(&self, from: Page, to: Page) -> Result<(), ModelError> {
        let all = self.tensor()?;
        all.f_get(to as i64)?.f_copy_(&all.f_get(from as i64)?)?;
        Ok(())
    }

    /// Gives the memory back. Nobody may use a page any more.
    pub(crate) fn clear(&mut self) {
        self.users.clear();
        self.free.clear();
        self.all = None;
    }
}
