//! Names of token prefixes, given by comparing tokens: what a hash stands for, without hashing.

use std::collections::HashMap;

use hybridkv::manager::{BlockHash, ExtraKeys, Manager};
use proptest::prelude::*;

/// A prefix under its extra keys. Equal exactly when keys and tokens are.
pub type Node = u32;

/// All prefixes seen so far, and the hashes that the manager gave them.
#[derive(Default)]
pub struct Prefixes {
    /// Number of tokens, the prefix that is one token shorter and the empty one, by node.
    nodes: Vec<(usize, Node, Node)>,
    children: HashMap<(Node, u32), Node>,
    roots: HashMap<(String, String), Node>,
    by_hash: HashMap<BlockHash, Node>,
    hashes: HashMap<Node, BlockHash>,
}

impl Prefixes {
    fn add(nodes: &mut Vec<(usize, Node, Node)>, node: (usize, Node, Node)) -> Node {
        nodes.push(node);
        nodes.len() as Node - 1
    }

    /// The prefixes of 1, 2, ... tokens.
    pub fn path(&mut self, keys: ExtraKeys<'_>, tokens: &[u32]) -> Vec<Node> {
        let Self { nodes, children, roots, .. } = self;
        let name = (keys.salt.to_owned(), keys.lora.to_owned());
        let root = nodes.len() as Node;
        let root = *roots.entry(name).or_insert_with(|| Self::add(nodes, (0, root, root)));
        let mut node = root;
        let mut path = Vec::with_capacity(tokens.len());
        for &token in tokens {
            let depth = nodes[node as usize].0 + 1;
            let add = || Self::add(nodes, (depth, node, root));
            node = *children.entry((node, token)).or_insert_with(add);
            path.push(node);
        }
        path
    }

    /// Learns the manager's hashes of a path: no two prefixes share one, and none has two.
    pub fn learn(
        &mut self,
        m: &Manager,
        unit: usize,
        keys: ExtraKeys<'_>,
        tokens: &[u32],
        path: &[Node],
    ) -> Result<(), TestCaseError> {
        for (i, hash) in m.hash(tokens, keys).hashes().iter().enumerate() {
            let node = path[(i + 1) * unit - 1];
            prop_assert_eq!(*self.by_hash.entry(*hash).or_insert(node), node, "two of one hash");
            prop_assert_eq!(*self.hashes.entry(node).or_insert(*hash), *hash, "two hashes of one");
        }
        Ok(())
    }

    /// The prefix that a hash stands for.
    pub fn named(&self, hash: &BlockHash) -> Option<Node> {
        self.by_hash.get(hash).copied()
    }

    /// Its tokens.
    pub fn len(&self, node: Node) -> usize {
        self.nodes[node as usize].0
    }

    /// Whether it was given under this salt.
    pub fn is_of(&self, node: Node, salt: &str) -> bool {
        let root = self.nodes[node as usize].2;
        self.roots.iter().any(|((of, _), &named)| named == root && of == salt)
    }

    /// Whether it is, or begins with, another one.
    pub fn begins_with(&self, mut node: Node, start: Node) -> bool {
        while self.len(node) > self.len(start) {
            node = self.parent(node);
        }
        node == start
    }

    /// The prefix that is one token shorter.
    pub fn parent(&self, node: Node) -> Node {
        self.nodes[node as usize].1
    }
}
