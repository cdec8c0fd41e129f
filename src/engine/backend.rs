//! The supervised process that answers for one policy: started, watched until it is ready, and ended.
